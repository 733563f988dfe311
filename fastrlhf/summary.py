"""How a run ended, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Summary"]


@dataclass(frozen=True)
class Summary:
    """How a run ended. Scores, KL, entropy and distinct_2 are on the held-out prompts."""

    score_before: float
    score_after: float
    kl: float | None  # exact, nats a sequence, mean over sequences; None without a reference
    entropy: float  # nats a token
    distinct_2: float  # distinct word bigrams over word bigrams
    steps: int  # rollouts trained on
    seconds: float
    peak_memory_mb: float  # VmHWM of the process, MiB
    phase_seconds: dict[str, float]
    memory_mb: dict[str, dict[str, float | None]]  # by phase: planned, measured (MiB)
