"""Binding to the compiled step of `AdamW8bit` (csrc/adamw8bit.cpp): pointers and sizes only."""

from functools import cache

import torch
from torch import Tensor

from . import _cpu
from ._reference_adamw8bit import BLOCK, AdamWStep, Moments, dynamic_map, pieces


@cache
def _maps() -> tuple[Tensor, Tensor]:
    """Both maps [2, 256] and their pieces [2, 8, 4], the signed ones first."""
    values = torch.stack([dynamic_map(True), dynamic_map(False)])
    lines = torch.tensor([pieces(True), pieces(False)], dtype=torch.float32, device="cpu")
    return values, lines


def adamw_step(parameter: Tensor, gradient: Tensor, moments: Moments, step: AdamWStep) -> None:
    """`_reference_adamw8bit.adamw_step`, to the same bits."""
    size = parameter.numel()
    assert gradient.shape == parameter.shape == (size,)
    coded = moments.first_scale is not None
    state_type = torch.uint8 if coded else torch.float32
    maps, lines = _maps()
    _cpu._csrc.adamw_step(
        _cpu._pointer(parameter, parameter.dtype, (size,)), _cpu.TYPES[parameter.dtype],
        _cpu._pointer(gradient, gradient.dtype, (size,)), _cpu.TYPES[gradient.dtype], size,
        _cpu._pointer(moments.first, state_type, (size,)),
        _cpu._pointer(moments.first_scale, torch.float32, (-(-size // BLOCK),)),
        _cpu._pointer(moments.second, state_type, (size,)),
        _cpu._pointer(moments.second_scale, torch.float32, (-(-size // BLOCK),)),
        _cpu._pointer(maps, torch.float32, (2, 256)),
        _cpu._pointer(lines, torch.float32, (2, 8, 4)),
        step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2, step.eps, step.decay,
        step.step_size, step.root_correction, step.key or 0, step.key is not None,
        _cpu._threads(size),
    )  # fmt: skip
