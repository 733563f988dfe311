"""What a run is rewarded for, and how scores are scaled: settings that `PPOConfig` inherits.

No torch is imported here: a typo on the command line is told before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .algorithm_settings import require

if TYPE_CHECKING:
    from .config import PPOConfig

__all__ = ["RewardSettings", "check_reward"]


@dataclass(frozen=True)
class RewardSettings:
    """Where scores come from and what is done to them before they are rewards."""

    reward: str | list = "sentiment"
    """A sum of shipped rewards (`sentiment + 0.1*length_band(20, 60)`), `path/to/file.py:function`,
    the folder of a reward model, an address (`http://…`), a classifier of the hub (`name#LABEL`),
    or a list of these."""
    reward_weights: list | None = None
    """A weight for each objective, in place of those in the sum. None: those, or 1."""
    reward_scaling: Literal["none", "log"] = "none"
    """`log`: sign(r)·log(1 + |r|) of each objective's scores."""
    reward_normalization: Literal["none", "running"] = "none"
    """`running`: each objective's scores get mean 0 and deviation 1, by those of training so
    far."""
    reward_clip: float | None = None
    """Bounds the absolute value of each objective's scores, after scaling and normalisation."""
    reward_bounds: list | None = None
    """[lowest, highest]: scores beyond are an error. Shipped rewards have their own."""
    reward_timeout: float = 60.0
    """Seconds that a judge which is a coroutine or an address may take for a rollout."""
    reward_retries: int = 2
    """How often such a judge is asked again after it failed or was late."""
    reward_backbone: Literal["auto", "shared", "own"] = "auto"
    """Whether a reward model is a role of the policy's backbone: `auto`: where it can be; `own`: a
    second copy of its base."""


def check_reward(config: PPOConfig) -> None:
    """Raise UserError for values that cannot be."""
    names = [config.reward] if isinstance(config.reward, str) else config.reward
    require(
        bool(names) and all(isinstance(name, str) and name for name in names),
        "reward must name a reward, or list names",
    )
    require(
        config.reward_weights is None or all(map(is_number, config.reward_weights)),
        "reward_weights must be a list of numbers",
    )
    bounds = config.reward_bounds
    require(
        bounds is None
        or (len(bounds) == 2 and all(map(is_number, bounds)) and bounds[0] < bounds[1]),
        "reward_bounds must be [lowest, highest]",
    )
    require(config.reward_clip is None or config.reward_clip > 0, "reward_clip must be above 0")
    require(config.reward_timeout > 0, "reward_timeout must be above 0")
    require(config.reward_retries >= 0, "reward_retries must not be negative")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
