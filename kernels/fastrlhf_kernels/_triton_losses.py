"""policy_loss and value_loss on the `triton` backend: sums of the rows that the kernels give.

The derivatives are written in the forward, so that the backward is one product. The host waits for
nothing, except where `sequence_ids` say which rows belong together: their numbers are not known.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import token_losses
from ._records import LossOutput, LossStats, PolicyLossSpec, ValueStats
from ._triton_tokens import flat, policy_rows, value_rows


class _Known(torch.autograd.Function):
    """A 0-dim loss whose derivatives [N, k] in its k inputs (or None) are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, derivatives: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(derivatives)
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (derivatives,) = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        for i, like in enumerate(ctx.like):
            if like is None or not ctx.needs_input_grad[2 + i]:
                gradients.append(None)
            else:
                shape, dtype = like
                gradients.append((loss_gradient * derivatives[:, i]).reshape(shape).to(dtype))
        return None, None, *gradients


def _among_zeros(mask: Tensor, x: Tensor) -> Tensor:
    """[N] of which the entries that the mask keeps are x."""
    return x.new_zeros(mask.numel()).masked_scatter(mask.reshape(-1), x)


def _weights(
    mask: Tensor, aggregation: str, sequence_ids: Tensor | None, num_items: int | Tensor | None
) -> tuple[Tensor, int | Tensor]:
    """token_losses.row_mean over all [N] rows, with weight 0 where the mask is False."""
    if aggregation != "sequence_mean":
        own_count, weights = mask.sum(), mask.reshape(-1).float()
    elif sequence_ids is None:
        weights = (mask.float() / mask.sum(1, keepdim=True).clamp(min=1)).reshape(-1)
        own_count = mask.any(1).sum()
    else:
        mean = token_losses.row_mean(mask, aggregation, sequence_ids, num_items, torch.float32)
        return _among_zeros(mask, mean.weights), mean.num_items
    return weights, own_count.clamp(min=1) if num_items is None else num_items


def _sequence_log_ratios(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, sequence_ids: Tensor | None
) -> Tensor:
    """token_losses.sequence_log_ratios over all [N] rows."""
    kept = mask.reshape(-1)
    if sequence_ids is not None:
        ratios = token_losses.sequence_log_ratios(
            logprobs[kept], old_logprobs[kept], mask, sequence_ids
        )
        return _among_zeros(mask, ratios)
    gaps = torch.where(kept, logprobs - old_logprobs, 0).reshape(mask.shape)
    means = gaps.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return means.expand(mask.shape).reshape(-1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    spec: PolicyLossSpec,
    *,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    kl: Tensor | None,
    sequence_ids: Tensor | None,
    num_items: int | Tensor | None,
) -> LossOutput[LossStats]:
    weights, items = _weights(mask, spec.aggregation, sequence_ids, num_items)
    given = [
        None if x is None else flat(x.detach())
        for x in (logprobs, old_logprobs, advantages, entropy, kl, ref_logprobs)
    ]
    assert given[0] is not None and given[1] is not None and given[2] is not None
    log_ratios = None
    if spec.loss == "gspo":
        log_ratios = _sequence_log_ratios(given[0], given[1], mask, sequence_ids)
    coefficients, rows = policy_rows(
        spec, given[0], given[1], given[2], weights, items,
        entropy=given[3], kl=given[4], ref_logprobs=given[5], sequence_log_ratios=log_ratios,
    )  # fmt: skip
    loss, *stats = ((weights[:, None] * rows).sum(0) / items).unbind()
    return LossOutput(_Known.apply(loss, coefficients, logprobs, entropy, kl), LossStats(*stats))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float | None,
    num_items: int | Tensor | None,
) -> LossOutput[ValueStats]:
    _, items = _weights(mask, "token_mean", None, num_items)
    given = (values.detach(), old_values.detach(), returns.detach())
    rows = value_rows(*given, mask, cliprange_value)
    loss, clipped = (rows[:, :2].sum(0) / items).unbind()
    return LossOutput(_Known.apply(loss, rows[:, 2:] / items, values), ValueStats(clipped))
