"""The losses of tokens whose statistics are known, in plain torch: the specification.

float32, or float64 for float64 inputs; differentiable by autograd. Every backend aggregates with
`RowMean`; `policy_derivatives` has the derivatives of `policy_rows` written down, as the kernels
do, and is tested against autograd. Formulas: docs/math.md, section 3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._records import LossOutput, LossStats, PolicyLossSpec, ValueStats


class PolicyRows(NamedTuple):
    """Per token, each [n]; only `loss` carries a gradient."""

    loss: Tensor
    approx_kl: Tensor
    clipped: Tensor
    ratio: Tensor
    entropy: Tensor
    kl: Tensor


def policy_rows(
    spec: PolicyLossSpec,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None,
    kl: Tensor | None,
    ref_logprobs: Tensor | None,
    sequence_log_ratios: Tensor | None = None,
) -> PolicyRows:
    """The loss of each token (docs/math.md, section 3), differentiable in logprobs, entropy, kl.

    sequence_log_ratios: for "gspo", of `sequence_log_ratios`.
    """
    token_log_ratio = logprobs - old_logprobs
    log_ratio = token_log_ratio
    if spec.loss == "gspo":
        assert sequence_log_ratios is not None
        # The sequence's ratio in value, the token's own log-probability in gradient.
        log_ratio = sequence_log_ratios + (logprobs - logprobs.detach())
    ratio = log_ratio.detach().exp()
    low, high = 1 - spec.cliprange_low, 1 + spec.cliprange_high
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    if spec.loss == "reinforce":
        loss = -logprobs * advantages
    elif spec.loss == "cispo":
        loss = -ratio.clamp(low, high) * advantages * logprobs
    elif spec.loss == "ppo_kl":
        live = log_ratio.exp()
        loss = -live * advantages
        if spec.old_kl_coef:
            loss = loss + spec.old_kl_coef * (torch.expm1(log_ratio) - log_ratio)
    else:
        bound = ratio.clamp(low, high)
        fixed = clipped
        if spec.dual_clip is not None:
            beyond = (advantages < 0) & (ratio > spec.dual_clip)
            bound = torch.where(beyond, spec.dual_clip, bound)
            fixed = fixed | beyond
        # The ratio of a fixed token may overflow: outside the graph, so that 0·∞ cannot arise.
        live = log_ratio.masked_fill(fixed, 0).exp()
        loss = -torch.where(fixed, bound, live) * advantages
    if spec.entropy_coef:
        assert entropy is not None
        loss = loss - spec.entropy_coef * entropy
    estimate = None
    if ref_logprobs is not None:
        gap = logprobs - ref_logprobs
        estimate = gap.square() / 2 if spec.kl_estimator == "k2" else torch.expm1(-gap) + gap
    if spec.kl_coef:
        term = kl if spec.kl_estimator == "exact" else estimate
        assert term is not None
        loss = loss + spec.kl_coef * term
    unknown = torch.full_like(ratio, torch.nan)
    reported = kl if kl is not None else estimate
    detached = token_log_ratio.detach()
    return PolicyRows(
        loss,
        torch.expm1(detached) - detached,
        clipped.to(ratio.dtype),
        ratio,
        unknown if entropy is None else entropy.detach(),
        unknown if reported is None else reported.detach(),
    )


def policy_derivatives(
    spec: PolicyLossSpec,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    ref_logprobs: Tensor | None,
    sequence_log_ratios: Tensor | None = None,
) -> Tensor:
    """[n, 3]: the derivatives of `policy_rows`' loss in logprobs, entropy and kl, written down.

    In logprobs: reinforce −A; ppo_clip −r·A, and 0 where clipped; ppo_kl −r·A and
    old_kl_coef·(r − 1); cispo −clip(r)·A; gspo as ppo_clip with the sequence's ratio; plus
    kl_coef·Δ for k2 and kl_coef·(1 − e^−Δ) for k3.
    """
    log_ratio = logprobs - old_logprobs if sequence_log_ratios is None else sequence_log_ratios
    ratio = log_ratio.exp()
    low, high = 1 - spec.cliprange_low, 1 + spec.cliprange_high
    if spec.loss == "reinforce":
        slope = -advantages
    elif spec.loss == "cispo":
        slope = -ratio.clamp(low, high) * advantages
    elif spec.loss == "ppo_kl":
        slope = -ratio * advantages + spec.old_kl_coef * torch.expm1(log_ratio)
    else:
        fixed = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
        if spec.dual_clip is not None:
            fixed |= (advantages < 0) & (ratio > spec.dual_clip)
        slope = torch.where(fixed, 0, -ratio * advantages)
    on_kl = 0.0
    if spec.kl_coef and spec.kl_estimator == "exact":
        on_kl = spec.kl_coef
    elif spec.kl_coef:
        assert ref_logprobs is not None
        gap = logprobs - ref_logprobs
        slope = slope + spec.kl_coef * (gap if spec.kl_estimator == "k2" else -torch.expm1(-gap))
    others = (torch.full_like(slope, x) for x in (-spec.entropy_coef, on_kl))
    return torch.stack((slope, *others), -1)


class RowMean(NamedTuple):
    """How rows become one number: a weighted sum, divided once."""

    weights: Tensor  # [n]
    num_items: int | Tensor

    def __call__(self, x: Tensor, span: slice = slice(None)) -> Tensor:
        return (self.weights[span] * x).sum() / self.num_items


def sequence_numbers(mask: Tensor, sequence_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, the valid rows' [n] places among them, and the valid tokens of each."""
    if sequence_ids is None:
        sequence_ids = torch.arange(mask.shape[0], device=mask.device)[:, None].expand_as(mask)
    ids = sequence_ids.reshape(-1)[mask.reshape(-1)]
    return ids.unique(return_inverse=True, return_counts=True)


def row_mean(
    mask: Tensor,
    aggregation: str,
    sequence_ids: Tensor | None,
    num_items: int | Tensor | None,
    dtype: torch.dtype,
) -> RowMean:
    """The aggregation over the valid rows (docs/math.md, section 3.5)."""
    valid = mask.reshape(-1).nonzero().squeeze(-1)
    weights = torch.ones(valid.numel(), dtype=dtype, device=mask.device)
    if aggregation == "sequence_mean":
        _, sequence, lengths = sequence_numbers(mask, sequence_ids)
        weights = 1 / lengths.to(dtype)[sequence]
        own_count = lengths.numel()
    else:
        own_count = valid.numel()
    if num_items is None:
        num_items = max(own_count, 1)
    return RowMean(weights, num_items)


def sequence_log_ratios(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, sequence_ids: Tensor | None
) -> Tensor:
    """Mean of logprob − old_logprob over each sequence's valid tokens, [n], without gradient.

    logprobs, old_logprobs: [n], of the valid rows. mask, sequence_ids: as in `row_mean`.
    """
    _, sequence, lengths = sequence_numbers(mask, sequence_ids)
    # A row of zeros for each sequence, summed row by row: index_add has no fixed order on a GPU.
    order = sequence.argsort(stable=True)
    place = torch.arange(order.numel(), device=order.device)
    place = place - (lengths.cumsum(0) - lengths)[sequence[order]]
    gaps = logprobs.new_zeros(lengths.numel(), int(lengths.amax()) if lengths.numel() else 0)
    gaps[sequence[order], place] = (logprobs - old_logprobs).detach()[order]
    return (gaps.sum(1) / lengths)[sequence]


def reduce_policy_rows(rows: PolicyRows, mean: RowMean) -> LossOutput[LossStats]:
    loss, *stats = (mean(x) for x in rows)
    return LossOutput(loss, LossStats(*stats))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mean: RowMean,
    cliprange_value: float | None,
) -> LossOutput[ValueStats]:
    """½·max((V−R)², (clip(V, V_old ± ε) − R)²) over [n] valid rows."""
    error = (values - returns).square()
    if cliprange_value is None:
        return LossOutput(mean(error) / 2, ValueStats(error.new_zeros(())))
    bounded = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    bounded_error = (bounded - returns).square()
    clipped = bounded_error > error
    loss = mean(torch.where(clipped, bounded_error, error)) / 2
    return LossOutput(loss, ValueStats(mean(clipped)))
