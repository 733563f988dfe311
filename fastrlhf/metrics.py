"""What a run leaves behind: its folder, its metrics line by line, the time of its phases."""

from __future__ import annotations

import json
import os
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
from .losses import MinibatchLoss
from .phase_memory import PhaseMemory
from .pretrained import write_through
from .run_lock import RunLock
from .types import Experience, Rollout

__all__ = ["PhaseTimer", "RunFolder", "step_metrics"]

METRICS = "metrics.jsonl"
# What a run writes line by line; other files in its folder are the user's own.
LINES = (
    METRICS, "evaluations.jsonl", "samples.jsonl", "findings.jsonl", "adaptations.jsonl",
    "curves.jsonl",
)  # fmt: skip


class RunFolder:
    """A folder that belongs to one run.

    Holds config.yaml, given.json, metrics.jsonl, samples.jsonl, checkpoints/ and plots.

    Args:
        path: the folder, or None for the first free `runs/<name>`, numbered.

    Nothing is made before `make`.

    Raises:
        UserError: ``path`` cannot be written.
    """

    def __init__(self, path: str | None, name: str):
        self.numbered = path is None
        self.given: dict[str, Any] = {}
        self.lock = RunLock()
        self.path = free_folder(Path("runs"), name) if path is None else Path(path)
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise self.unwritable("not a folder that you may write to")

    def note_given(self, model: Any, train_dataset: Any, eval_dataset: Any, reward: Any) -> None:
        """Note what was given from Python in place of settings, for given.json.

        Names are kept as they are; of whatever has none, True says that it was given.
        """

        def name(value: Any) -> Any:
            named = isinstance(value, list) and all(isinstance(x, str) for x in value)
            return value if value is None or isinstance(value, str) or named else True

        self.given = {"model": name(model), "train_dataset": name(train_dataset)}
        self.given |= {"eval_dataset": name(eval_dataset), "reward": name(reward)}

    @property
    def holds_run(self) -> bool:
        metrics = self.path / METRICS
        return metrics.exists() and metrics.stat().st_size > 0

    def refuse_run(self) -> None:
        """Raise UserError if a run is there already."""
        if self.holds_run:
            raise UserError(
                f"{self.path} already holds a run; give another output_dir, remove it, or go on "
                f"with it (--resume {self.path})"
            )

    def hold(self) -> None:
        """Keep other runs out of the folder until `lock` is released; UserError if one is in it."""
        self.lock.hold(self.path)

    def make(self) -> None:
        """Make the folder and hold it.

        Raises:
            UserError: it already holds a run, one that is under way, or cannot be written.
        """
        self.refuse_run()
        try:
            # A numbered folder must be new: another run may have taken it since.
            self.path.mkdir(parents=True, exist_ok=not self.numbered)
            self.hold()
            self.refuse_run()
            begun = (self.path / METRICS).exists()
            (self.path / METRICS).touch()
            if begun:
                # What a run that ended in its first rollout has left is none of this one's.
                self.cut({METRICS: 0})
        except OSError as error:
            raise self.unwritable(error.strerror) from error

    def unwritable(self, reason: str | None) -> UserError:
        return UserError(
            f"the run's folder {self.path} cannot be written ({reason}); give another output_dir"
        )

    def write_text(self, name: str, text: str) -> None:
        """Write the file ``name``; a crash leaves the old one or the new one."""
        made = self.path / f".{name}.new"
        with self.writing(name):
            made.write_text(text, encoding="utf-8")
            made.replace(self.path / name)

    def positions(self) -> dict[str, int]:
        """How long each file of lines is, once it is on the disk."""
        files = [path for name in LINES if (path := self.path / name).exists()]
        for path in files:
            write_through(path)
        return {path.name: path.stat().st_size for path in files}

    def check_positions(self, positions: Mapping[str, int], checkpoint: Path) -> None:
        """Raise UserError where a file has lost lines since ``checkpoint``."""
        for name, size in positions.items():
            path = self.path / name
            if not path.exists() or path.stat().st_size < size:
                raise UserError(
                    f"{path} is shorter than it was at checkpoint {checkpoint}; put it back as it "
                    "was, or start a new run"
                )

    def cut(self, positions: Mapping[str, int]) -> None:
        """Bring the files of lines back to these lengths, and remove what a run's end writes."""
        for path in (self.path / name for name in LINES):
            if path.name in positions:
                os.truncate(path, positions[path.name])
            else:
                path.unlink(missing_ok=True)
        for name in ("summary.json", "plot.png"):
            (self.path / name).unlink(missing_ok=True)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line of JSON to the file ``name``; a crash later leaves it whole."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self.writing(name):
            # Who calls a trainer's `step` from a loop of his own has begun no run.
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(line)

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Raise UserError where the file ``name`` cannot be written in the block."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path / name} cannot be written ({error.strerror}); make room on the disk "
                "of this folder, then go on from the last checkpoint, or start again"
            ) from error

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        self.append(METRICS, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics of every step so far."""
        return self.read(METRICS)

    def read(self, name: str) -> list[dict[str, Any]]:
        """The lines of the file ``name``."""
        text = (self.path / name).read_text(encoding="utf-8")
        # Not splitlines, which also splits at separators that stand within a JSON text.
        return [json.loads(line) for line in text.split("\n") if line]


def mean(values: Iterable[Tensor | None]) -> float:
    return float(torch.stack([value for value in values if value is not None]).mean())


def update_metrics(losses: Sequence[MinibatchLoss]) -> dict[str, float]:
    """What the optimizer steps on a rollout did."""
    policy = [loss.policy.stats for loss in losses]
    return {
        "policy/approx_kl": mean(stats.approx_kl for stats in policy),
        "policy/clipfrac": mean(stats.clipfrac for stats in policy),
        "policy/entropy": mean(stats.entropy for stats in policy),
        "policy/ratio": mean(stats.ratio for stats in policy),
        "loss/policy": mean(loss.policy.loss for loss in losses),
        # The policy is still the one that was scored: 1, 0, 0 in every correct run, but for the
        # rounding of sampling where old_logprobs is sampled. Where approx_kl is 0 every ratio is
        # 1; their mean, summed over microbatches, is 1 but for rounding.
        "check/first_ratio": 1.0 if policy[0].approx_kl == 0 else float(policy[0].ratio),
        "check/first_approx_kl": float(policy[0].approx_kl),
        "check/first_clipfrac": float(policy[0].clipfrac),
        "grad_norm": mean(loss.grad_norm for loss in losses),
    }


def free_folder(parent: Path, name: str) -> Path:
    number = 1
    while (parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return parent / (name if number == 1 else f"{name}-{number}")


class PhaseTimer:
    """Seconds spent in each phase, in this step and in the whole run, and its memory.

    Args:
        started: called with a phase's name when it begins, to show it.

    `memory` says of each phase how many bytes it has held at most.
    """

    def __init__(self, started: Callable[[str], None] = lambda phase: None):
        self.started = started
        self.total: dict[str, float] = defaultdict(float)
        self.step: dict[str, float] = defaultdict(float)
        self.memory = PhaseMemory()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.started(phase)
        begin = time.perf_counter()
        try:
            with self.memory(phase):
                yield
        finally:
            seconds = time.perf_counter() - begin
            self.total[phase] += seconds
            self.step[phase] += seconds

    def state_dict(self) -> dict[str, float]:
        return dict(self.total)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Add the seconds of the process before."""
        for phase, seconds in state.items():
            self.total[phase] += seconds

    def take_step(self) -> dict[str, float]:
        """This step's seconds by phase, as metrics; the next step starts at zero."""
        taken = {f"time/{phase}": seconds for phase, seconds in self.step.items()}
        self.step.clear()
        return taken


def step_metrics(
    rollout: Rollout,
    scores: Tensor,
    experience: Experience,
    losses: Sequence[MinibatchLoss],
    kl_coef: float,
) -> dict[str, float]:
    """What a step did; names as in docs/math.md, section 5.15.

    Without a reference there is no `objective/kl` nor what is made of it.

    Args:
        scores: [B], counted where the sequence trains.
        losses: one for every optimizer step on this rollout; none if all were skipped.
    """
    mask = experience.response_mask
    judged = mask.any(-1)
    score = float(scores[judged].mean())

    line = {
        "objective/scores": score,
        "objective/entropy": float(experience.entropy[mask].mean()),
        "val/num_eos_tokens": int(rollout.ended.sum()),
    } | (update_metrics(losses) if losses else {})
    # What was not measured has no figure: without a reference the KL is not known to be 0.
    if experience.kl is not None:
        kl = float((experience.kl * mask).sum(-1)[judged].mean())
        line["objective/kl"] = kl
        line["objective/non_score_reward"] = -kl_coef * kl
        line["objective/rlhf_reward"] = score - kl_coef * kl
    values = [loss.value for loss in losses if loss.value is not None]
    if values and experience.values is not None:
        line["loss/value"] = mean(value.loss for value in values)
        line["val/clipfrac"] = mean(value.stats.clipfrac for value in values)
        line["val/explained_variance"] = explained_variance(
            experience.values, experience.returns, mask
        )
    return line
