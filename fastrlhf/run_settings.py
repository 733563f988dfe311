"""How a run is watched, judged and kept: the settings that `PPOConfig` inherits.

No torch is imported here: a typo on the command line is told before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .algorithm_settings import require
from .errors import UserError, nearest

if TYPE_CHECKING:
    from .config import PPOConfig

__all__ = ["RunSettings", "check_run"]

TRACKER_NAMES = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that do not change what an optimizer step is."""

    output_dir: str | None = None
    """The run's folder; it must not hold a run. None: `runs/<recipe>`, numbered if taken."""
    eval_prompts: int = 64
    """Prompts held out of training for the scores before and after."""
    eval_steps: int | None = None
    """Rollouts between evaluations on the held-out prompts. None: only before and after."""
    num_samples: int = 4
    """Samples printed at each evaluation."""
    save_steps: int | None = 10
    """Rollouts between checkpoints, from which the run can be resumed. None: no checkpoints."""
    save_total_limit: int | None = 2
    """How many checkpoints are kept, the newest ones. None: all."""
    save_best: bool = False
    """Keep the weights with the highest held-out score as `checkpoints/best`; needs eval_steps."""
    max_skipped_steps: int = 3
    """Optimizer steps in a row whose loss or gradient may be NaN or infinite before the run stops;
    each is skipped."""
    report_to: str | list = "none"
    """Where figures go beside metrics.jsonl: `none`, `tensorboard`, `wandb`, `trackio`, or a list
    of them."""
    seed: int = 1
    """Seeds everything that is drawn."""
    audit: bool = False
    """Fail if the score or update phase creates a vocab-sized tensor beyond the workspace."""

    @property
    def trackers(self) -> list[str]:
        """The trackers that `report_to` names, each once."""
        named = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in dict.fromkeys(map(str, named)) if name != "none"]


def check_run(config: PPOConfig) -> None:
    """Raise UserError for values that cannot be."""
    require(config.eval_prompts >= 1, "eval_prompts must be at least 1")
    require(config.eval_steps is None or config.eval_steps >= 1, "eval_steps must be at least 1")
    require(config.save_steps is None or config.save_steps >= 1, "save_steps must be at least 1")
    require(
        config.save_total_limit is None or config.save_total_limit >= 1,
        "save_total_limit must be at least 1, or null; set save_steps to null for no checkpoints",
    )
    require(
        not config.save_best or config.eval_steps is not None,
        "save_best compares held-out scores; set eval_steps too",
    )
    require(config.max_skipped_steps >= 1, "max_skipped_steps must be at least 1")
    for name in ("num_samples", "seed"):
        require(getattr(config, name) >= 0, f"{name} must not be negative")
    for name in config.trackers:
        if name not in TRACKER_NAMES:
            known = nearest(name, ("none", *TRACKER_NAMES))
            raise UserError(f"report_to: {name!r} is no tracker; {known}")
