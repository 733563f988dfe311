"""How a run ended, in numbers and in a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from transformers import PreTrainedConfig

from .config import PPOConfig
from .evaluation import Evaluation
from .memory import planned_and_measured
from .metrics import PhaseTimer, RunFolder
from .plot import can_plot, save_plot

__all__ = ["RewardSummary", "Summary", "summarize"]


@dataclass(frozen=True)
class Summary:
    """How a run ended. Scores, KL, entropy and distinct_2 are on the held-out prompts."""

    score_before: float
    score_after: float
    kl: float | None  # exact, nats a sequence, mean over sequences; None without a reference
    entropy: float  # nats a token
    distinct_2: float  # distinct word bigrams over word bigrams
    steps: int  # rollouts trained on
    seconds: float  # of a resumed run: up to the checkpoint, and since
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


def summarize(
    folder: RunFolder,
    config: PPOConfig,
    after: Evaluation,
    *,
    title: str,
    steps: int,
    seconds: float,
    timer: PhaseTimer,
    model_config: PreTrainedConfig | None,
    prompt_length: int,
    device: str,
    say: Callable[[str], None],
) -> Summary:
    """Draw the plot and sum a run up; writes summary.json too.

    Args:
        after: the evaluation that the run ended with; the first is in the folder.
        timer: has the seconds and the memory of each phase.
        model_config, prompt_length, device: what the memory plan is of.
    """
    peak_mb = timer.memory.peak_mb()
    score_before = folder.read("evaluations.jsonl")[0]["score"]
    if can_plot():
        save_plot([folder.path], folder.path / "plot.png", title)
    else:
        say("no plot: pip install matplotlib")
    memory, told = planned_and_measured(
        config,
        model_config,
        timer.memory.peaks,
        prompt_length=prompt_length,
        device=device,
    )
    say(told)
    summary = Summary(
        score_before=score_before,
        score_after=after.score,
        kl=after.kl,
        entropy=after.entropy,
        distinct_2=after.distinct_2,
        steps=steps,
        seconds=seconds,
        peak_memory_mb=peak_mb,
        phase_seconds=dict(timer.total),
        memory_mb=memory,
    )
    folder.write_text("summary.json", json.dumps(asdict(summary)) + "\n")
    say(f"\nthe run is in {folder.path}")
    return summary
