"""How a run ended, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RewardSummary", "Summary"]


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


@dataclass(frozen=True)
class RewardSummary:
    """How a reward model turned out; accuracies are shares of pairs."""

    accuracy: float  # on held-out pairs
    train_accuracy: float  # on pairs of as many training rows
    gap: float  # train_accuracy - accuracy
    margin: float  # mean score difference of held-out pairs
    calibration_error: float  # on held-out pairs, before the scores are normalised
    loss: float  # on held-out pairs
    steps: int
    best_step: int
    stopped: str | None  # why training ended early
    seconds: float
    folder: str
    phase_seconds: dict[str, float]
