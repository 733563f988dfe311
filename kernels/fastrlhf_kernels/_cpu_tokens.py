"""Bindings to the compiled kernels of one number a token (csrc/tokens.cpp).

Inputs of any float type and layout, flattened and read as float32; sums are in double and the same
for every number of threads. A loss is computed with its derivatives in one sweep, of which autograd
gets the product with the incoming gradient.
"""

from typing import Any

import torch
from torch import Tensor

from . import _cpu, token_losses
from ._records import (
    KL_ESTIMATORS,
    LOSSES,
    LossOutput,
    LossStats,
    PolicyLossSpec,
    ValueStats,
)

CHUNK = 4096
"""tokens per partial sum, as in csrc/tokens.h"""


def _read(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().reshape(-1).contiguous()


def _pointer(x: Tensor | None, n: int, dtype: torch.dtype = torch.float32) -> int:
    return _cpu._pointer(x, dtype, (n,))


def _memory(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # Torch's default type and device may be anything.
    return torch.empty(n, dtype=dtype, device="cpu")


def _partial(n: int, sums: int) -> Tensor:
    return _memory(-(-n // CHUNK) * sums, torch.float64)


def _sums_pointer(x: Tensor) -> int:
    return _pointer(x, x.numel(), torch.float64)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`reference.gae`, [B, T] float32, summed in double."""
    (rows, columns), n = mask.shape, mask.numel()
    given = [_read(x) for x in (rewards, values)]
    used = mask.reshape(-1).contiguous()
    advantages, returns = _memory(n), _memory(n)
    _cpu._csrc.gae(
        *(_pointer(x, n) for x in given), _pointer(used, n, torch.bool), rows, columns, gamma, lam,
        _pointer(advantages, n), _pointer(returns, n), _cpu._threads(n),
    )  # fmt: skip
    return advantages.view(rows, columns), returns.view(rows, columns)


def whiten(x: Tensor, mask: Tensor, center: bool) -> Tensor:
    """`reference.whiten`, float32 in the shape of x, with moments in double."""
    n, given, used = x.numel(), _read(x), mask.reshape(-1).contiguous()
    partial, out = _partial(n, 2), _memory(n)
    _cpu._csrc.whiten(
        _pointer(given, n), _pointer(used, n, torch.bool), n, center, _sums_pointer(partial),
        _pointer(out, n), _cpu._threads(n),
    )  # fmt: skip
    return out.view(x.shape)


class ValueSums(torch.autograd.Function):
    """[2]: the sum of ½·max((V−R)², (clip(V, V_old ± ε) − R)²), and of the clipped tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        mask: Tensor,
        cliprange_value: float | None,
    ) -> Tensor:
        n = mask.numel()
        given = [_read(x) for x in (values, old_values, returns)]
        used = mask.reshape(-1).contiguous()
        gradient = _memory(n) if ctx.needs_input_grad[0] else None
        partial, sums = _partial(n, 2), _memory(2, torch.float64)
        _cpu._csrc.value_rows(
            *(_pointer(x, n) for x in given), _pointer(used, n, torch.bool), n,
            float("inf") if cliprange_value is None else cliprange_value,
            _pointer(gradient, n), _sums_pointer(partial), _sums_pointer(sums), _cpu._threads(n),
        )  # fmt: skip
        ctx.save_for_backward(None if gradient is None else gradient.view(values.shape))
        ctx.dtype = values.dtype
        sums[0] /= 2
        return sums.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[0]).to(ctx.dtype), None, None, None, None


class PolicySums(torch.autograd.Function):
    """[6]: the sums of `token_losses.PolicyRows` over the tokens, each times its weight.

    weights and sequence_log_ratios: in the shape of the mask, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: PolicyLossSpec,
        logprobs: Tensor,
        entropy: Tensor | None,
        kl: Tensor | None,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logprobs: Tensor | None,
        weights: Tensor | None,
        sequence_log_ratios: Tensor | None,
    ) -> Tensor:
        n = mask.numel()
        given = [_read(x) for x in (logprobs, old_logprobs, advantages)]
        others = [_read(x) for x in (entropy, kl, ref_logprobs, weights, sequence_log_ratios)]
        used = mask.reshape(-1).contiguous()
        slopes = _memory(n) if ctx.needs_input_grad[1] else None
        partial, sums = _partial(n, 6), _memory(6, torch.float64)
        _cpu._csrc.policy_rows(
            *(_pointer(x, n) for x in given), _pointer(used, n, torch.bool), n,
            *(_pointer(x, n) for x in others),
            LOSSES.index(spec.loss), KL_ESTIMATORS.index(spec.kl_estimator),
            1 - spec.cliprange_low, 1 + spec.cliprange_high,
            float("inf") if spec.dual_clip is None else spec.dual_clip,
            spec.kl_coef, spec.old_kl_coef, spec.entropy_coef,
            _pointer(slopes, n), _sums_pointer(partial), _sums_pointer(sums), _cpu._threads(n),
        )  # fmt: skip
        slopes = None if slopes is None else slopes.view(logprobs.shape)
        ctx.save_for_backward(slopes, mask, weights)
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, kl)]
        on_kl = spec.kl_coef if spec.kl_estimator == "exact" else 0.0
        ctx.constants = (-spec.entropy_coef, on_kl)
        return sums.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes, mask, weights = ctx.saved_tensors
        gradients: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[1]:
            gradients[0] = (slopes * grad[0]).to(ctx.dtypes[0])
        weight = mask if weights is None else mask * weights
        for i, constant in enumerate(ctx.constants, start=1):
            if ctx.needs_input_grad[i + 1]:
                gradients[i] = (weight * (constant * grad[0])).to(ctx.dtypes[i])
        return None, *gradients, None, None, None, None, None, None


def _items(mask: Tensor, num_items: int | Tensor | None) -> int | Tensor:
    return max(int(mask.sum()), 1) if num_items is None else num_items


def _among_zeros(x: Tensor, mask: Tensor) -> Tensor:
    """[n] numbers of the valid rows at their places among those of the mask, and 0 elsewhere."""
    return x.new_zeros(mask.shape).masked_scatter_(mask, x)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float | None,
    num_items: int | Tensor | None,
) -> LossOutput[ValueStats]:
    """`token_losses.value_loss` of tensors of any one shape."""
    sums = ValueSums.apply(values, old_values, returns, mask, cliprange_value)
    loss, clipfrac = (sums / _items(mask, num_items)).unbind()
    return LossOutput(loss, ValueStats(clipfrac.detach()))


def policy_loss(
    spec: PolicyLossSpec,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    kl: Tensor | None,
    sequence_ids: Tensor | None,
    num_items: int | Tensor | None,
) -> LossOutput[LossStats]:
    """`token_losses.policy_rows` of tensors of any one shape, aggregated."""
    weights = log_ratios = None
    if spec.aggregation == "sequence_mean":
        mean = token_losses.row_mean(mask, spec.aggregation, sequence_ids, num_items, torch.float32)
        weights, num_items = _among_zeros(mean.weights, mask), mean.num_items
    if spec.loss == "gspo":
        valid = [x.detach()[mask].float() for x in (logprobs, old_logprobs)]
        log_ratios = token_losses.sequence_log_ratios(valid[0], valid[1], mask, sequence_ids)
        log_ratios = _among_zeros(log_ratios, mask)
    sums = PolicySums.apply(
        spec, logprobs, entropy, kl, old_logprobs, advantages, mask, ref_logprobs, weights,
        log_ratios,
    )  # fmt: skip
    loss, *stats = (sums / _items(mask, num_items)).unbind()
    return LossOutput(loss, LossStats(*(x.detach() for x in stats)))
