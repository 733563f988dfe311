"""The configurations of the verbs: `PPOConfig` with other algorithms and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .config import PPOConfig

__all__ = [
    "CONFIGS",
    "A2CConfig",
    "GRPOConfig",
    "RLOOConfig",
    "ReinforceConfig",
    "kind_of",
    "kind_of_run",
]


@dataclass(frozen=True)
class GRPOConfig(PPOConfig):
    """GRPO and its kin: no critic; completions of one prompt are compared with each other."""

    algorithm: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"

    family: ClassVar[tuple[str, ...]] = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


@dataclass(frozen=True)
class RLOOConfig(PPOConfig):
    """RLOO: no critic; the other completions of a prompt are the baseline."""

    algorithm: Literal["rloo"] = "rloo"

    family: ClassVar[tuple[str, ...]] = ("rloo",)


@dataclass(frozen=True)
class ReinforceConfig(PPOConfig):
    """REINFORCE with a baseline; `baseline: value` has a critic."""

    algorithm: Literal["reinforce"] = "reinforce"

    family: ClassVar[tuple[str, ...]] = ("reinforce",)


@dataclass(frozen=True)
class A2CConfig(PPOConfig):
    """Advantage actor-critic; `lam: 0` takes the TD residual."""

    algorithm: Literal["a2c"] = "a2c"

    family: ClassVar[tuple[str, ...]] = ("a2c",)


CONFIGS: dict[str, type[PPOConfig]] = {
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "rloo": RLOOConfig,
    "reinforce": ReinforceConfig,
    "a2c": A2CConfig,
}


def kind_of(algorithm: Any) -> type[PPOConfig]:
    """The configuration that has ``algorithm``, else PPO's, which then says what is wrong."""
    return next((kind for kind in CONFIGS.values() if algorithm in kind.family), PPOConfig)


def kind_of_run(settings: Mapping[str, Any]) -> type[PPOConfig]:
    """The configuration that a run's ``settings`` are of, whichever trainer wrote them."""
    if "modes" in settings:
        from .hierarchical_config import HierarchicalConfig

        return HierarchicalConfig
    if "meta_steps" in settings:
        from .meta_config import MetaConfig

        return MetaConfig
    if "pool_share" in settings:
        from .multi_agent.config import MultiAgentConfig

        return MultiAgentConfig
    return kind_of(settings.get("algorithm"))
