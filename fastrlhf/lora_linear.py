"""A linear layer with a LoRA adapter as one operation: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, W frozen.

PEFT composes it of six, each of which writes and, in the backward, keeps or reads an activation.
Here the adapter's product is added in place to the base's, forward and backward, and of all
activations x and x·Aᵀ alone are kept: x as it came, also where the adapter is in float32 and the
base is not (PEFT keeps a float32 copy of x for each layer).

PEFT's own layer goes on where this one does not apply: adapters off or several of them, dropout,
other kinds of adapters, quantised bases, and a base layer with another forward. Sampling, which
takes no gradient, has a product of its own for few rows (`FusedLoraLinear.few_rows_forward`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from fastrlhf_kernels.few_rows import few_rows_lora

__all__ = ["FusedLoraLinear", "fuse"]


class LoraProduct(torch.autograd.Function):
    """x [..., D], weight [K, D], bias [K], down [r, D], up [K, r] -> [..., K]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        result = F.linear(x, weight, bias)
        low = F.linear(x.to(down.dtype), down)
        flat, rows = result.view(-1, result.shape[-1]), low.view(-1, low.shape[-1])
        if up.dtype == result.dtype:
            flat.addmm_(rows, up.t(), alpha=scaling)
        else:
            # The sum is rounded once, as PEFT does.
            flat.copy_(torch.addmm(flat.to(up.dtype), rows, up.t(), alpha=scaling))
        ctx.save_for_backward(x, weight, down, up, rows)
        ctx.scaling = scaling
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, rows = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        precise = flat.to(up.dtype)
        rows_gradient = torch.mm(precise, up).mul_(ctx.scaling)
        to_x = to_down = to_up = None
        if ctx.needs_input_grad[0]:
            to_x = torch.mm(flat, weight)
            if down.dtype == to_x.dtype:
                to_x.addmm_(rows_gradient, down)
            else:
                to_x = torch.addmm(to_x.to(down.dtype), rows_gradient, down).to(x.dtype)
            to_x = to_x.view_as(x)
        if ctx.needs_input_grad[3]:
            to_down = torch.mm(rows_gradient.t(), x.reshape(-1, x.shape[-1]).to(down.dtype))
        if ctx.needs_input_grad[4]:
            to_up = torch.mm(precise.t(), rows).mul_(ctx.scaling)
        return to_x, None, None, to_down, to_up, None


class FusedLoraLinear(lora.Linear):
    """PEFT's layer, which computes as `LoraProduct` where it can."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.one_adapter()
        if name is None or args or kwargs or "forward" in vars(self.get_base_layer()):
            return super().forward(x, *args, **kwargs)
        return LoraProduct.apply(x, *self.operands(name))

    def few_rows_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`forward` without gradient, for the few rows of a decoding step."""
        name = self.one_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        return few_rows_lora(x, *self.operands(name))

    def operands(self, name: str) -> tuple[Any, ...]:
        """What `LoraProduct` and `few_rows_lora` take after x."""
        base = self.get_base_layer()
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return base.weight, base.bias, down, up, self.scaling[name]

    def one_adapter(self) -> str | None:
        """The one adapter that computes, if this layer is one operation with it."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = self.get_base_layer()
        if len(names) != 1 or names[0] in self.lora_variant or base.weight.requires_grad:
            return None
        plain = isinstance(self.lora_dropout[names[0]], nn.Identity)
        return names[0] if plain and self.lora_B[names[0]].bias is None else None


def fuse(layers: list[lora.LoraLayer]) -> None:
    """Let those of PEFT's layers that can compute as one operation."""
    for layer in layers:
        # Subclasses, like bitsandbytes' layers, multiply in their own way.
        if type(layer) is lora.Linear and type(layer.get_base_layer()) is nn.Linear:
            layer.__class__ = FusedLoraLinear
