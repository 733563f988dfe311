"""The settings of a run that is gone on with: its own, and what may be changed in them.

No torch is imported here: a typo on the command line is told before it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .config import PPOConfig, from_mapping, read_value
from .configs import kind_of_run
from .errors import UserError
from .run_files import refuse_reward_run

__all__ = ["CHECKPOINT", "check_settings_kept", "parse", "resume_config", "run_config", "run_of"]

CHECKPOINT = re.compile(r"step-(\d{6,})")

# Settings that a resumed run may change: the numbers of training are the same with them.
FREE = (
    "output_dir", "eval_steps", "num_samples", "save_steps", "save_total_limit", "save_best",
    "max_skipped_steps", "report_to", "audit", "trunk_cache_mb", "matrix_games", "eval_adaptation",
    "eval_every",
)  # fmt: skip
# These change rounding alone; they are what helps where memory ran out.
ROUNDING = ("microbatch_tokens", "workspace_mb", "trunk_cache", "gradient_checkpointing")


def run_of(chosen: str | Path) -> Path:
    """The run's folder, of that folder or of a checkpoint in it."""
    path = Path(chosen)
    return path.parent.parent if CHECKPOINT.fullmatch(path.name) else path


def resume_config(
    chosen: str | Path, overrides: Sequence[tuple[str, str]], kind: type[PPOConfig]
) -> PPOConfig:
    """The configuration in a run's folder, with what is given beside it.

    Raises:
        UserError: no run there, or settings that would make it another run.
    """
    run = run_of(chosen)
    settings = settings_of(run)
    kept = from_mapping(settings, kind)
    given = {key: read_value(key, value) for key, value in overrides}
    config = from_mapping({**settings, **given, "output_dir": str(run)}, kind)
    check_settings_kept(f"the run in {run}", kept, config)
    return config


def run_config(run: Path) -> PPOConfig:
    """The configuration in a run's folder, whichever trainer wrote it.

    Raises:
        UserError: no run there, or that of a reward model.
    """
    settings = settings_of(run)
    return from_mapping(settings, kind_of_run(settings))


def settings_of(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} holds no run (no config.yaml); give the folder of one")
    refuse_reward_run(run)
    return parse(path.read_text(encoding="utf-8"), str(path))


def parse(text: str, where: str) -> dict[str, Any]:
    """The settings that a configuration's YAML holds; ``where`` is named if it holds none."""
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{where} must hold the run's settings")
    return settings


def check_settings_kept(where: str, kept: PPOConfig, ours: PPOConfig) -> list[str]:
    """Whether a run with the settings ``kept`` can go on with ``ours``.

    Returns:
        The settings that differ and change rounding, and no more.

    Raises:
        UserError: settings that would make it another run.
    """
    before, after = dataclasses.asdict(kept), dataclasses.asdict(ours)
    differ = [name for name in before if before[name] != after[name] and name not in FREE]
    if "total_episodes" in differ:
        check_length(where, kept, ours)
        differ.remove("total_episodes")
    changed = [name for name in differ if name not in ROUNDING]
    if changed:
        listed = ", ".join(f"{n} (it is {before[n]!r}, not {after[n]!r})" for n in changed)
        raise UserError(
            f"{where} cannot go on with another {listed}: it would be another run; leave "
            f"{'it' if len(changed) == 1 else 'them'} out, or start a new run"
        )
    return differ


def check_length(where: str, kept: PPOConfig, ours: PPOConfig) -> None:
    if kept.lr_scheduler_type != "constant":
        raise UserError(
            f"{where} cannot go on with total_episodes {ours.total_episodes}: its learning rate "
            f"falls to zero at {kept.total_episodes}, so every step would have been another; leave "
            "it out, or start with lr_scheduler_type: constant"
        )
    if ours.total_episodes < kept.total_episodes:
        raise UserError(
            f"total_episodes can only grow: {where} was started with {kept.total_episodes}; leave "
            "it out, or give more"
        )
