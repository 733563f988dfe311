"""The optimizer: AdamW without weight decay, in four makes, and its learning-rate schedule.

`adamw_8bit` is ours: 2 bytes of state a parameter, and bfloat16 weights are rounded stochastically,
by bits that the run's seed and the step alone decide. The others are there to compare with and to
fall back on. Only ours can take the small steps of full training in bfloat16: bitsandbytes rounds
to the nearest, and torch keeps its states in the weights' own dtype, so it is refused there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from fastrlhf_kernels import AdamW8bit

from .config import PPOConfig
from .errors import UserError

__all__ = ["make_optimizer", "make_schedule"]


def make_optimizer(parameters: Iterable[nn.Parameter], config: PPOConfig) -> torch.optim.Optimizer:
    """The AdamW that ``config.optim`` names, with its learning rate and epsilon.

    Tensors below 4096 elements keep float32 moments in the 8-bit makes. What `state_dict()` holds
    for each parameter, and `load_state_dict` continues from to the last bit:

    - ``adamw_8bit``: tensors step (int64), exp_avg, exp_avg_sq (uint8, or float32 where small), and
      for 8-bit ones exp_avg_scale, exp_avg_sq_scale (float32, one for 256 elements).
    - ``adamw_torch``: tensors step (float32), exp_avg, exp_avg_sq (float32).
    - ``adamw_bnb_8bit``, ``paged_adamw_8bit``: step (a Python int), and in a dict of its own
      (``__bnb_optimizer_quant_state__``) the same moments as state1, state2, with their scales
      absmax1, absmax2 and the 256 values of their codes, qmap1, qmap2.

    Raises:
        UserError: adamw_torch for weights that are not float32.
    """
    parameters = list(parameters)
    settings = {"lr": config.learning_rate, "eps": config.adam_eps, "weight_decay": 0.0}
    if config.optim == "adamw_8bit":
        return AdamW8bit(parameters, **settings, seed=config.seed)  # type: ignore[arg-type]
    if config.optim == "adamw_torch":
        if any(parameter.dtype != torch.float32 for parameter in parameters):
            raise UserError(
                "adamw_torch would keep its states in the weights' 16 bits, which loses small "
                "steps; set optim to adamw_8bit"
            )
        # Its other makes hold temporaries: as large as one tensor, or as all of them.
        return torch.optim.AdamW(parameters, **settings, fused=True)  # type: ignore[arg-type]
    import bitsandbytes

    if config.optim == "paged_adamw_8bit":
        if any(parameter.device.type != "cpu" for parameter in parameters):
            return bitsandbytes.optim.PagedAdamW8bit(parameters, **settings)
        warnings.warn(
            "paged_adamw_8bit pages from a GPU's memory to the host's; on a CPU it is the same as "
            "adamw_bnb_8bit",
            stacklevel=2,
        )
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


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
