"""RLHF for one memory-constrained GPU, or none.

from fastrlhf import PPOConfig, PPOTrainer

trainer = PPOTrainer("smollm2-135m", reward_funcs="sentiment", args=PPOConfig())
summary = trainer.train()
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backbone import SharedBackbone
    from .config import PPOConfig, load_config
    from .configs import A2CConfig, GRPOConfig, ReinforceConfig, RLOOConfig
    from .errors import SelfCheckError, UserError
    from .hierarchical import HierarchicalTrainer
    from .hierarchical_config import HierarchicalConfig
    from .loss_modules import LinearLogprobs, LinearPolicyLoss, PolicyLoss, ValueLoss
    from .meta import MetaTrainer
    from .meta_config import MetaConfig
    from .multi_agent import MultiAgentConfig, MultiAgentTrainer
    from .reward_config import RewardConfig
    from .reward_trainer import RewardTrainer
    from .rewards.model import RewardModel
    from .summary import Summary
    from .trainer import PPOTrainer
    from .trainers import A2CTrainer, GRPOTrainer, ReinforceTrainer, RLOOTrainer

__all__ = [
    "A2CConfig",
    "A2CTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "HierarchicalConfig",
    "HierarchicalTrainer",
    "LinearLogprobs",
    "LinearPolicyLoss",
    "MetaConfig",
    "MetaTrainer",
    "MultiAgentConfig",
    "MultiAgentTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PolicyLoss",
    "RLOOConfig",
    "RLOOTrainer",
    "ReinforceConfig",
    "ReinforceTrainer",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "SelfCheckError",
    "SharedBackbone",
    "Summary",
    "UserError",
    "ValueLoss",
    "load_config",
]
__version__ = version("fastrlhf")

HOMES = {
    "A2CConfig": "configs",
    "A2CTrainer": "trainers",
    "GRPOConfig": "configs",
    "GRPOTrainer": "trainers",
    "HierarchicalConfig": "hierarchical_config",
    "HierarchicalTrainer": "hierarchical",
    "LinearLogprobs": "loss_modules",
    "LinearPolicyLoss": "loss_modules",
    "MetaConfig": "meta_config",
    "MetaTrainer": "meta",
    "MultiAgentConfig": "multi_agent",
    "MultiAgentTrainer": "multi_agent",
    "PPOConfig": "config",
    "PPOTrainer": "trainer",
    "PolicyLoss": "loss_modules",
    "RLOOConfig": "configs",
    "RLOOTrainer": "trainers",
    "ReinforceConfig": "configs",
    "ReinforceTrainer": "trainers",
    "RewardConfig": "reward_config",
    "RewardModel": "rewards.model",
    "RewardTrainer": "reward_trainer",
    "SelfCheckError": "errors",
    "SharedBackbone": "backbone",
    "Summary": "summary",
    "UserError": "errors",
    "ValueLoss": "loss_modules",
    "load_config": "config",
}


def __getattr__(name: str):
    # Torch and transformers take seconds to import; a typo on the command line should not.
    if name in HOMES:
        return getattr(import_module(f".{HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
