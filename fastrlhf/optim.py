"""The optimizer: AdamW with 8-bit states from bitsandbytes, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .config import PPOConfig

__all__ = ["make_optimizer", "make_schedule"]


def make_optimizer(parameters: Iterable[nn.Parameter], config: PPOConfig) -> torch.optim.Optimizer:
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2022), without weight decay.

    Tensors below 4096 elements keep 32-bit moments, which is bitsandbytes' default.
    """
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        list(parameters), lr=config.learning_rate, eps=config.adam_eps, weight_decay=0.0
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: PPOConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up from zero, then linear to zero at the run's end or constant."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.lr_scheduler_type == "constant":
            return 1.0
        left = config.optimizer_steps - config.warmup_steps
        return max(0.0, 1 - (step - config.warmup_steps) / max(1, left))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
