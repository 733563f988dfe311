"""A run's folder as it is read: by `plot`, `report` and `eval`, while the run goes on or after it.

What a crash or a run under way has half written, a last line, is left out; whatever else is not
JSON is an error. Files that are missing are empty: a run of one rollout has no evaluation yet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

__all__ = [
    "RunRecord",
    "is_run",
    "read_given",
    "read_json_lines",
    "read_run",
    "refuse_other_runs",
    "refuse_reward_run",
]

METRICS = "metrics.jsonl"
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """What a run has written so far."""

    path: Path
    metrics: Lines  # one a rollout
    evaluations: Lines  # on the held-out prompts, by step
    samples: Lines  # of those evaluations: step, prompt, completion, score
    findings: Lines  # the hacking monitor's: step, finding, example
    settings: dict[str, Any]
    given: dict[str, Any]  # in place of settings, from Python
    summary: dict[str, Any] | None  # None: the run has not ended

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.absolute().name

    def episode(self, step: int) -> int:
        """Episodes trained on by the end of ``step``."""
        if step == 0:
            return 0
        by_step = {line["step"]: line["episode"] for line in self.metrics}
        return by_step.get(step, step * self.settings.get("batch_size", 1))


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is a folder that a run writes to."""
    return (Path(path) / METRICS).is_file()


def read_given(path: str | Path) -> dict[str, Any]:
    """What the run in ``path`` was given in place of settings (`metrics.RunFolder.note_given`)."""
    file = Path(path) / "given.json"
    return json.loads(file.read_text()) if is_run(path) and file.is_file() else {}


def read_run(path: str | Path) -> RunRecord:
    """Read the run in the folder ``path``.

    Raises:
        UserError: no run there, none that has finished a rollout, or files that are broken.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no run {path}: give a run's folder, like runs/ppo")
    if not is_run(path):
        runs = sorted(p.parent.name for p in path.glob(f"*/{METRICS}"))
        inside = f"; it holds runs: {', '.join(runs[:8])}" if runs else ""
        raise UserError(f"{path} holds no {METRICS}: give a run's folder{inside}")
    refuse_reward_run(path)
    metrics = read_json_lines(path / METRICS)
    if not metrics:
        raise UserError(f"the run in {path} has finished no rollout yet; wait for its first line")
    summary = read_json_lines(path / "summary.json")
    return RunRecord(
        path,
        metrics,
        # A run that went on from a checkpoint has some of them twice.
        list({line["step"]: line for line in read_json_lines(path / "evaluations.jsonl")}.values()),
        read_json_lines(path / "samples.jsonl"),
        read_json_lines(path / "findings.jsonl"),
        read_settings(path / "config.yaml"),
        read_given(path),
        summary[-1] if summary else None,
    )


def refuse_reward_run(path: Path) -> None:
    """Raise UserError for the run of a reward model: it has preferences, and no episodes."""
    if "rating_gap" in read_settings(path / "config.yaml"):
        raise UserError(
            f"the run in {path} trained a reward model, not a policy: see its evaluations.jsonl "
            f"and calibration.png, or train with reward={path}"
        )


def refuse_other_runs(path: Path) -> None:
    """Raise UserError for a run whose policy does not answer a prompt as it stands."""
    refuse_reward_run(path)
    settings = read_settings(path / "config.yaml")
    reasons = {
        "modes": "picks a mode for every prompt before it answers; its held-out scores are in "
        "evaluations.jsonl, and what it said in samples.jsonl",
        "meta_steps": "trained what other runs begin from; train with "
        f"adapter={path / 'checkpoints/final'} and give that run, or see curves.jsonl",
        "pool_share": "trained agents, which answer each other; how they do on held-out starts is "
        "in evaluations.jsonl, and what they said in samples.jsonl",
    }
    for name, reason in reasons.items():
        if name in settings:
            raise UserError(f"the run in {path} {reason}")


def read_json_lines(path: Path) -> Lines:
    """The objects in a file of JSON Lines; none where it is missing."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    read = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            read.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A whole line ends: what stands behind the last end is still being written.
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg}); remove that line"
            ) from error
    return read


def read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return settings if isinstance(settings, dict) else {}
