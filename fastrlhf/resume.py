"""Going on with a run: its newest whole checkpoint, and its files as they were at that moment.

A checkpoint whose checksums do not fit is told by name and the one before is taken. What was
written after the checkpoint that is taken is removed: lines of metrics.jsonl, samples.jsonl and
evaluations.jsonl, and later checkpoints. A run that ended before its first checkpoint was due
starts again, with a trainer that has not trained yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .callbacks import Callbacks
from .config import from_mapping
from .errors import UserError
from .evaluation import Evaluation
from .identity import refuse_others
from .kept_settings import CHECKPOINT, check_settings_kept, parse
from .metrics import METRICS, RunFolder
from .run_checkpoints import Checkpoints, numbered, remove, step_of, tidy
from .run_state import Damaged, read_whole

__all__ = ["Resumed", "kept_evaluation", "resume"]


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int  # rollouts done
    facts: Mapping[str, Any]


def resume(
    checkpoints: Checkpoints,
    chosen: str | Path | bool,
    ours: Mapping[str, str],
    say: Callable[[str], None],
) -> Resumed:
    """Bring a run back to a checkpoint.

    Args:
        chosen: True or the run's folder for the newest whole one, or the folder of one.
        ours: the model's and data's `identity`.

    Raises:
        UserError: no checkpoint is whole, or it is of another configuration, model or data.
    """
    folder, config = checkpoints.folder, checkpoints.config
    if not (folder.path / "config.yaml").is_file():
        raise UserError(f"{folder.path} holds no run to resume; leave resume out to start one")
    tidy(checkpoints.path)
    one = not isinstance(chosen, bool) and CHECKPOINT.fullmatch(Path(chosen).name) is not None
    there = [Path(chosen)] if one and not isinstance(chosen, bool) else numbered(checkpoints.path)
    if not there:
        start_over(checkpoints, say)
        return Resumed(0, {})
    path, state, text = newest_whole(there, say, numbered(checkpoints.path))
    kept = from_mapping(parse(text, f"{path}/config.yaml"), type(config))
    rounding = check_settings_kept(f"checkpoint {path}", kept, config)
    if rounding:
        say(f"{', '.join(rounding)} changed: the numbers will differ in rounding from here on")
    refuse_others(str(path), state["identity"], ours)
    folder.check_positions(state["files"], path)
    checkpoints.run.load(path, state)
    for later in numbered(checkpoints.path):
        if step_of(later) > state["step"]:
            remove(later)
    # What a run's end wrote is not this run's any more.
    if (final := checkpoints.path / "final").exists():
        remove(final)
    folder.cut(state["files"])
    say(f"going on after step {state['step']}, from {path}")
    return Resumed(state["step"], state)


def newest_whole(
    there: list[Path], say: Callable[[str], None], known: list[Path]
) -> tuple[Path, Any, str]:
    for path in there:
        try:
            return path, *read_whole(path)
        except Damaged as error:
            say(f"warning: {error}")
            last = error
    if others := [path.name for path in known if path.name not in {p.name for p in there}]:
        raise UserError(f"{last}; choose another: {' or '.join(others)}") from last
    raise UserError(f"{last}, and no other is whole; start a new run") from last


def start_over(checkpoints: Checkpoints, say: Callable[[str], None]) -> None:
    """Begin again, if no more than that was lost."""
    folder, config = checkpoints.folder, checkpoints.config
    callbacks = checkpoints.run.others["callbacks"]
    if isinstance(callbacks, Callbacks) and callbacks.state.global_step:
        # Nothing holds what weights, optimizer, schedule and generators were before.
        raise UserError(
            f"{folder.path} has no checkpoint to go on from, and this trainer has begun to train; "
            "make it anew, then call its train(resume_from_checkpoint=True)"
        )
    lines = (folder.path / METRICS).read_bytes().count(b"\n") if folder.holds_run else 0
    # With as many lines as save_steps the first checkpoint was being written.
    if config.save_steps is None or lines > config.save_steps:
        raise UserError(
            f"{folder.path} has no checkpoint to go on from; start a new run, with save_steps set"
        )
    say("no checkpoint was written yet: the run starts again")
    folder.cut({})


def kept_evaluation(folder: RunFolder, step: int) -> Evaluation | None:
    """The evaluation after ``step`` rollouts as the run's files have it; None where it is due.

    A callback that ends a run in an evaluation has made it the last one.
    """
    figures = folder.read("evaluations.jsonl")[-1]
    if figures.pop("step") != step:
        return None
    samples = [line for line in folder.read("samples.jsonl") if line.pop("step") == step]
    scores, prompts, completions = (
        [sample.pop(name) for sample in samples] for name in ("score", "prompt", "completion")
    )
    return Evaluation(
        **figures, scores=scores, prompts=prompts, completions=completions, told=samples
    )
