"""What a run leaves behind: its folder, its metrics line by line, the time of its phases."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .advantages import explained_variance
from .errors import UserError
from .losses import MicrobatchLoss
from .types import Experience, Rollout

__all__ = ["PhaseTimer", "RunFolder", "peak_memory_mb", "step_metrics"]

METRICS = "metrics.jsonl"


class RunFolder:
    """A folder that belongs to one run.

    Holds config.yaml, metrics.jsonl, samples.jsonl, checkpoints/ and plots.

    Args:
        path: a folder that holds no run yet, or None for the first free `runs/<name>`, numbered.

    Nothing is made before `make`.

    Raises:
        UserError: ``path`` already holds a run, or cannot be written.
    """

    def __init__(self, path: str | None, name: str):
        self.numbered = path is None
        self.path = free_folder(Path("runs"), name) if path is None else Path(path)
        metrics = self.path / METRICS
        if metrics.exists() and metrics.stat().st_size:
            raise UserError(
                f"{self.path} already holds a run; give another output_dir or remove it"
            )
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise self.unwritable("not a folder that you may write to")

    def make(self) -> None:
        """Make the folder."""
        try:
            # A numbered folder must be new: another run may have taken it since.
            self.path.mkdir(parents=True, exist_ok=not self.numbered)
            (self.path / METRICS).touch()
        except OSError as error:
            raise self.unwritable(error.strerror) from error

    def unwritable(self, reason: str | None) -> UserError:
        return UserError(
            f"the run's folder {self.path} cannot be written ({reason}); give another output_dir"
        )

    def write_text(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="utf-8")

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line of JSON to the file ``name``; a crash later leaves it whole."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        self.append(METRICS, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics of every step so far."""
        return [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]


def free_folder(parent: Path, name: str) -> Path:
    number = 1
    while (parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return parent / (name if number == 1 else f"{name}-{number}")


class PhaseTimer:
    """Seconds spent in each phase, in this step and in the whole run.

    Args:
        started: called with a phase's name when it begins, to show it.
    """

    def __init__(self, started: Callable[[str], None] = lambda phase: None):
        self.started = started
        self.total: dict[str, float] = defaultdict(float)
        self.step: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.started(phase)
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self.total[phase] += seconds
            self.step[phase] += seconds

    def take_step(self) -> dict[str, float]:
        """This step's seconds by phase, as metrics; the next step starts at zero."""
        taken = {f"time/{phase}": seconds for phase, seconds in self.step.items()}
        self.step.clear()
        return taken


def step_metrics(
    rollout: Rollout,
    scores: Tensor,
    experience: Experience,
    losses: Sequence[MicrobatchLoss],
    kl_coef: float,
) -> dict[str, float]:
    """What a step did; names as in docs/math.md, section 5.15.

    Args:
        scores: [B], counted where the sequence trains.
        losses: one for every optimizer step on this rollout.
    """
    mask = experience.response_mask
    judged = mask.any(-1)
    kl = float((experience.kl * mask).sum(-1)[judged].mean())
    score = float(scores[judged].mean())

    def mean(values: Iterable[Tensor | None]) -> float:
        return float(torch.stack([value for value in values if value is not None]).mean())

    policy = [loss.policy.stats for loss in losses]
    return {
        "objective/scores": score,
        "objective/kl": kl,
        "objective/entropy": float(experience.entropy[mask].mean()),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score - kl_coef * kl,
        "policy/approx_kl": mean(stats.approx_kl for stats in policy),
        "policy/clipfrac": mean(stats.clipfrac for stats in policy),
        "policy/entropy": mean(stats.entropy for stats in policy),
        "policy/ratio": mean(stats.ratio for stats in policy),
        "loss/policy": mean(loss.policy.loss for loss in losses),
        # The policy is still the one that was scored: 1, 0, 0 in every correct run. Where approx_kl
        # is 0 every ratio is 1; their mean, summed over microbatches, is 1 but for rounding.
        "check/first_ratio": 1.0 if policy[0].approx_kl == 0 else float(policy[0].ratio),
        "check/first_approx_kl": float(policy[0].approx_kl),
        "check/first_clipfrac": float(policy[0].clipfrac),
        "val/num_eos_tokens": int(rollout.ended.sum()),
        "grad_norm": mean(loss.grad_norm for loss in losses),
    } | value_metrics(experience, losses)


def value_metrics(experience: Experience, losses: Sequence[MicrobatchLoss]) -> dict[str, float]:
    """How the critic does; nothing without one."""
    values = [loss.value for loss in losses if loss.value is not None]
    if not values:
        return {}
    mask = experience.response_mask
    return {
        "loss/value": float(torch.stack([value.loss for value in values]).mean()),
        "val/clipfrac": float(torch.stack([value.stats.clipfrac for value in values]).mean()),
        "val/explained_variance": explained_variance(experience.values, experience.returns, mask),
    }


def peak_memory_mb() -> float:
    """The most memory that this process has had resident, in MiB (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    # macOS counts bytes; other systems without /proc count KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
