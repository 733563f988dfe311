"""What trains a reward model's weights: AdamW, with a learning rate of its own for the head.

The learning rate rises over the warm-up and then falls to zero, if it does, over the steps that
the data make at most: batches in which nothing is compared are not dealt.
"""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR

from .backbone import SharedBackbone
from .reward_config import RewardConfig

__all__ = ["make_optimizer"]


def make_optimizer(
    backbone: SharedBackbone, config: RewardConfig, steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer of the reward role's weights, and its schedule over ``steps`` steps."""
    head = backbone.reward_head
    assert head is not None
    own = [p for p in backbone.trainable() if p is not head.linear.weight]
    groups = [
        {"params": own, "lr": config.learning_rate},
        {"params": [head.linear.weight], "lr": config.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, eps=config.adam_eps, weight_decay=0.0)

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.lr_scheduler_type == "constant":
            return 1.0
        left = steps - config.warmup_steps
        return max(0.0, 1 - (step - config.warmup_steps) / max(1, left))

    return optimizer, LambdaLR(optimizer, factor)
