"""The settings of hierarchical training: PPO's, and those of the policy over response modes.

No torch is imported here: a typo on the command line is told before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .algorithm_settings import require
from .config import PPOConfig
from .modes import MODES, read_modes

__all__ = ["HierarchicalConfig"]


@dataclass(frozen=True)
class HierarchicalConfig(PPOConfig):
    """`PPOConfig` with a policy over response modes; `num_ppo_epochs` and `cliprange` are both
    levels'."""

    modes: str | list | dict = field(default_factory=lambda: list(MODES))
    """The modes: names that ship (concise, informative, creative), a mapping of name to
    instruction, or the path of a YAML file with either. One mode is no choice, and then nothing is
    learnt of it."""
    mode_learning_rate: float = 0.04
    """Of the policy over modes and its baseline; constant. 0: modes stay evenly random."""
    mode_entropy_coef: float = 0.01
    """Weight of the entropy of the policy over modes, beside advantages of unit size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # A run's folder keeps the instructions, not where they were read.
        object.__setattr__(self, "modes", read_modes(self.modes))
        for name in ("mode_learning_rate", "mode_entropy_coef"):
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        require(
            self.kl_coef > 0 or self.use_peft,
            "the policy over modes reads the states of the reference, which full training at "
            "kl_coef 0 does not keep; set kl_coef above 0 or use_peft: true",
        )
        require(
            self.old_logprobs == "scored",
            "the policy over modes reads the states of the reference, which old_logprobs: sampled "
            "does without; set it to scored",
        )
