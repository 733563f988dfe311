"""Base weights in 8 or 4 bits (bitsandbytes), computed with as one thing in every phase.

Stored are bitsandbytes' formats: int8 with a scale a row, or NF4 with nested scales (Dettmers et
al. 2022, 2023). Computed is `F.linear(x, W, bias)` with W brought back to the dtype of x: always,
with and without a gradient, on every device. bitsandbytes itself has other kernels without a
gradient than with one, repacks weights for some CPUs, and rounds activations in int8 with outlier
columns that depend on the whole batch: old and new log-probabilities would differ before the first
step, and a sequence's depend on its neighbours. One exception: without a gradient, one token a row
on a GPU (sampling) in NF4 runs through bitsandbytes' kernel, which reads a quarter of the bytes.

W is made again in the backward instead of being kept from the forward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from .errors import UserError

__all__ = [
    "DequantizedLinear",
    "Quantization",
    "check_quantization",
    "compute_dequantized",
    "is_quantized",
    "layer_weights",
    "loading_options",
]

Quantization = Literal["int8", "nf4"]
INT8_RANGE = 127.0


class FrozenLinear(torch.autograd.Function):
    """`F.linear` with a weight that is made where it is needed; it and the bias get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: DequantizedLinear) -> Tensor:
        ctx.linear = linear
        return linear.multiply(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.dequantized(grad.dtype), None


class DequantizedLinear(nn.Linear):
    """What a bitsandbytes linear computes with; mixed into its class by `compute_dequantized`."""

    holding = False
    held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return FrozenLinear.apply(x, self)
        if x.is_cuda and x.shape[-2] == 1 and not self.holding and hasattr(self, "quant_state"):
            return super().forward(x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized(x.dtype), bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, [out, in]; within `layer_weights` made at most once."""
        if self.held is not None and self.held.dtype == dtype:
            return self.held
        weight = dequantize(self, dtype)
        if self.holding:
            self.held = weight
        return weight


def dequantize(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a bitsandbytes linear in ``dtype``."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = linear.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        # bitsandbytes 0.50's CPU kernel starts a block at every row, where blocks run across rows:
        # rows that are not whole blocks come back wrong. As rows of one block each they do not.
        rows, size = copy.copy(state), state.shape.numel()
        width = state.blocksize if size % state.blocksize == 0 else size
        rows.shape = torch.Size((size // width, width))
        return dequantize_4bit(weight, rows).view(state.shape).to(dtype)
    # bitsandbytes moves the scales from the weight to the module when it first runs.
    held: Any = linear.state if weight.SCB is None else weight
    return weight.data.to(dtype).mul_(held.SCB[:, None] * (1 / INT8_RANGE))


@functools.cache
def dequantized_class(kind: Any) -> Any:
    return type(kind.__name__, (DequantizedLinear, kind), {})


def quantized_linears(module: nn.Module) -> list[nn.Module]:
    """The bitsandbytes linears in a module."""
    # By name: bitsandbytes is not imported for models without one.
    stored = ("Params4bit", "Int8Params")
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return [m for m in linears if type(m.weight).__name__ in stored]


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether some of a model's weights are stored in 8 or 4 bits."""
    return bool(quantized_linears(model))


def compute_dequantized(model: PreTrainedModel) -> None:
    """Let the quantised linears of a model compute as this module says.

    Raises:
        UserError: weights that bitsandbytes repacked, which rounds their scales for good.
    """
    linears = quantized_linears(model)
    states = [getattr(linear.weight, "quant_state", None) for linear in linears]
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise UserError(
            "bitsandbytes repacked and rounded this model's NF4 weights when it ran on the CPU; "
            "load the model anew and hand it over before it runs"
        )
    for linear in linears:
        kind: Any = type(linear)
        if not issubclass(kind, DequantizedLinear):
            linear.__class__ = dequantized_class(kind)


@contextmanager
def layer_weights(layer: nn.Module) -> Iterator[None]:
    """Within the block, each quantised weight of ``layer`` is made at most once and kept.

    For several roles that run through the layer one after the other, without gradients.
    """
    linears = [m for m in layer.modules() if isinstance(m, DequantizedLinear)]
    for linear in linears:
        linear.holding = True
    try:
        yield
    finally:
        for linear in linears:
            linear.holding, linear.held = False, None


def loading_options(
    quantization: Quantization, *, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What transformers' from_pretrained is called with to quantise while loading."""
    if quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def check_quantization(
    quantization: Quantization, *, device: str | torch.device, dtype: torch.dtype
) -> None:
    """Quantise one small weight and bring it back: what works for it works for a model.

    Raises:
        UserError: bitsandbytes is missing, or cannot do this on the device in the dtype.
    """
    try:
        from bitsandbytes import nn as bnb

        kind: Any = bnb.Linear4bit if quantization == "nf4" else bnb.Linear8bitLt
        options = {"quant_type": "nf4"} if quantization == "nf4" else {"has_fp16_weights": False}
        linear = kind(64, 64, bias=False, **options).to(dtype).to(device)
        works = bool(dequantize(linear, dtype).isfinite().all())
        reason = "its values do not come back"
    except ImportError:
        raise UserError(
            f"quantization {quantization} needs bitsandbytes; run: pip install bitsandbytes"
        ) from None
    except (AssertionError, AttributeError, OSError, RuntimeError, ValueError) as error:
        works, reason = False, " ".join(str(error).split())[:120]
    if not works:
        raise UserError(
            f"quantization {quantization} does not run in {dtype} on {device} ({reason}); set "
            "quantization: null"
        )
