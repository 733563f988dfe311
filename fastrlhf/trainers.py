"""The trainer under the names that its algorithms are known by."""

from __future__ import annotations

from typing import ClassVar

from .config import PPOConfig
from .configs import A2CConfig, GRPOConfig, ReinforceConfig, RLOOConfig
from .trainer import PPOTrainer

__all__ = ["TRAINERS", "A2CTrainer", "GRPOTrainer", "RLOOTrainer", "ReinforceTrainer"]


class GRPOTrainer(PPOTrainer):
    """Trains with GRPO, Dr. GRPO, DAPO, GSPO or CISPO; arguments are those of `PPOTrainer`."""

    config_class: ClassVar[type[PPOConfig]] = GRPOConfig


class RLOOTrainer(PPOTrainer):
    """Trains with REINFORCE leave-one-out; arguments are those of `PPOTrainer`."""

    config_class: ClassVar[type[PPOConfig]] = RLOOConfig


class ReinforceTrainer(PPOTrainer):
    """Trains with REINFORCE; arguments are those of `PPOTrainer`."""

    config_class: ClassVar[type[PPOConfig]] = ReinforceConfig


class A2CTrainer(PPOTrainer):
    """Trains with advantage actor-critic; arguments are those of `PPOTrainer`."""

    config_class: ClassVar[type[PPOConfig]] = A2CConfig


TRAINERS: dict[str, type[PPOTrainer]] = {
    "ppo": PPOTrainer,
    "grpo": GRPOTrainer,
    "rloo": RLOOTrainer,
    "reinforce": ReinforceTrainer,
    "a2c": A2CTrainer,
}
