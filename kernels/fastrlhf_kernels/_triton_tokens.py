"""Losses of tokens whose statistics are known, with their derivatives, in one pass over [N].

The derivatives are written down after docs/math.md, section 3, and tested against autograd of
token_losses.py. Nothing waits for the host: rows that do not train are told by a mask or a weight
of 0, and are not read. No sums: whoever calls adds up, in one place.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._records import (
    ENTROPY,
    KL,
    KL_ESTIMATORS,
    LOGPROB,
    LOSSES,
    REF_LOGPROB,
    PolicyLossSpec,
)
from ._triton import Variant
from ._triton_logits import variant

BLOCK = 1024


@triton.jit
def _expm1(x):
    """e^x − 1 and e^x − 1 − x, by their series where the exponential would cancel."""
    p = 2.7557319e-7
    p = p * x + 2.7557319e-6
    p = p * x + 2.4801587e-5
    p = p * x + 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x + 8.3333333e-3
    p = p * x + 4.1666667e-2
    p = p * x + 1.6666667e-1
    series = (p * x + 0.5) * x * x
    far = tl.exp(x) - 1.0
    near = tl.abs(x) < 1.0
    return tl.where(near, x + series, far), tl.where(near, series, far - x)


@triton.jit(do_not_specialize=["rows", "stride", "ref_stride"])
def _policy_kernel(
    logprobs_ptr, entropy_ptr, kl_ptr, ref_logprobs_ptr, old_logprobs_ptr, advantages_ptr,
    log_ratios_ptr, weights_ptr, num_items_ptr, coefficients_ptr, tokens_ptr,
    rows, stride, ref_stride, low, high, dual_clip, kl_coef, old_kl_coef, entropy_coef,
    LOSS: tl.constexpr, ESTIMATOR: tl.constexpr, HAS_REF: tl.constexpr, HAS_KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """token_losses.policy_rows, and the weighted derivatives of its loss."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    weight = tl.load(weights_ptr + row, mask=inside, other=0.0)
    mask = weight != 0.0
    logprob = tl.load(logprobs_ptr + row * stride, mask=mask, other=0.0)
    old_logprob = tl.load(old_logprobs_ptr + row, mask=mask, other=0.0)
    advantage = tl.load(advantages_ptr + row, mask=mask, other=0.0)
    token_log_ratio = logprob - old_logprob
    log_ratio = token_log_ratio
    if LOSS == "gspo":
        log_ratio = tl.load(log_ratios_ptr + row, mask=mask, other=0.0)
    ratio = tl.exp(log_ratio)
    above, below = ratio > high, ratio < low
    clipped = ((advantage > 0.0) & above) | ((advantage < 0.0) & below)
    bound = tl.where(above, high, tl.where(below, low, ratio))
    if LOSS == "reinforce":
        loss, slope = -logprob * advantage, -advantage
    elif LOSS == "cispo":
        loss, slope = -bound * advantage * logprob, -bound * advantage
    elif LOSS == "ppo_kl":
        rise, gap = _expm1(log_ratio)
        loss = tl.where(old_kl_coef != 0.0, old_kl_coef * gap, 0.0) - ratio * advantage
        slope = tl.where(old_kl_coef != 0.0, old_kl_coef * rise, 0.0) - ratio * advantage
    else:
        beyond = (advantage < 0.0) & (ratio > dual_clip)
        bound = tl.where(beyond, dual_clip, bound)
        fixed = clipped | beyond
        loss = -tl.where(fixed, bound, ratio) * advantage
        slope = tl.where(fixed, 0.0, -ratio * advantage)
    unknown = ratio * 0.0 + float("nan")
    entropy, kl = unknown, unknown
    on_entropy, on_kl = ratio * 0.0, ratio * 0.0
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + row * stride, mask=mask, other=0.0)
        loss -= tl.where(entropy_coef != 0.0, entropy_coef * entropy, 0.0)
        on_entropy = tl.where(mask, -entropy_coef, 0.0)
    if HAS_REF:
        gap = logprob - tl.load(ref_logprobs_ptr + row * ref_stride, mask=mask, other=0.0)
        if ESTIMATOR == "k2":
            kl, pull = gap * gap * 0.5, gap
        else:
            fall, kl = _expm1(-gap)
            pull = -fall
        if ESTIMATOR != "exact":
            loss += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
            slope += tl.where(kl_coef != 0.0, kl_coef * pull, 0.0)
    if HAS_KL:
        kl = tl.load(kl_ptr + row * stride, mask=mask, other=0.0)
        if ESTIMATOR == "exact":
            loss += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
            on_kl = tl.where(mask, kl_coef, 0.0)
    _, approx_kl = _expm1(token_log_ratio)
    scale = tl.div_rn(weight, tl.load(num_items_ptr))
    line = coefficients_ptr + 3 * row
    tl.store(line, tl.where(mask, slope * scale, 0.0), mask=inside)
    tl.store(line + 1, tl.where(mask, on_entropy * scale, 0.0), mask=inside)
    tl.store(line + 2, tl.where(mask, on_kl * scale, 0.0), mask=inside)
    line = tokens_ptr + 6 * row
    tl.store(line, tl.where(mask, loss, 0.0), mask=inside)
    tl.store(line + 1, tl.where(mask, approx_kl, 0.0), mask=inside)
    tl.store(line + 2, tl.where(mask & clipped, 1.0, 0.0), mask=inside)
    tl.store(line + 3, tl.where(mask, ratio, 0.0), mask=inside)
    tl.store(line + 4, tl.where(mask, entropy, 0.0), mask=inside)
    tl.store(line + 5, tl.where(mask, kl, 0.0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _value_kernel(
    values_ptr, old_values_ptr, returns_ptr, mask_ptr, tokens_ptr, rows, cliprange,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """½·max((V − R)², (clip(V) − R)²), which is the clipped one, and the derivative."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    mask = inside & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    value = tl.load(values_ptr + row, mask=mask, other=0.0)
    old_value = tl.load(old_values_ptr + row, mask=mask, other=0.0)
    target = tl.load(returns_ptr + row, mask=mask, other=0.0)
    low, high = old_value - cliprange, old_value + cliprange
    bounded = tl.where(value > high, high, tl.where(value < low, low, value))
    gap, bounded_gap = value - target, bounded - target
    clipped = bounded_gap * bounded_gap > gap * gap
    line = tokens_ptr + 3 * row
    larger = tl.where(clipped, bounded_gap, gap)
    tl.store(line, larger * larger * 0.5, mask=inside)
    tl.store(line + 1, tl.where(clipped, 1.0, 0.0), mask=inside)
    tl.store(line + 2, tl.where(clipped, 0.0, gap), mask=inside)


def flat(x: Tensor) -> Tensor:
    """[N] float32 (a mask stays one), adjacent."""
    return (x if x.dtype == torch.bool else x.float()).reshape(-1).contiguous()


def _estimator(spec: PolicyLossSpec, has_reference: bool, has_kl: bool) -> str:
    """The spec's, or where nothing depends on it one of those that are compiled anyway."""
    if has_reference:
        return "k3" if spec.kl_estimator == "exact" and not has_kl else spec.kl_estimator
    return "exact" if has_kl else "k3"


def policy_rows(
    spec: PolicyLossSpec,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    num_items: int | Tensor,
    *,
    entropy: Tensor | None,
    kl: Tensor | None,
    ref_logprobs: Tensor | None,
    sequence_log_ratios: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Derivatives [n, 3] of the weighted mean loss, and token_losses.PolicyRows as [n, 6].

    All inputs are [n] float32; rows whose weight is 0 are not read, and get zeros. The derivatives
    in logprob, entropy and KL are times weights / num_items. logprobs, entropy and kl have one
    stride, that of `logprobs`.
    """
    rows = logprobs.numel()
    # One row has whatever stride it came with.
    stride = logprobs.stride(0) if rows > 1 else 1
    assert rows <= 1 or all(x is None or x.stride(0) == stride for x in (entropy, kl))
    adjacent = (old_logprobs, advantages, weights, sequence_log_ratios)
    assert all(x is None or (x.shape == (rows,) and x.is_contiguous()) for x in adjacent)
    coefficients = weights.new_empty(rows, 3)
    tokens = weights.new_empty(rows, 6)
    if rows == 0:
        return coefficients, tokens
    if not isinstance(num_items, Tensor):
        num_items = torch.full((), num_items, dtype=torch.float32, device=weights.device)

    def given(x: Tensor | None) -> Tensor:
        return weights if x is None else x  # a pointer that is not there is never read

    _policy_kernel[(triton.cdiv(rows, BLOCK),)](
        logprobs, given(entropy), given(kl), given(ref_logprobs), old_logprobs, advantages,
        given(sequence_log_ratios), weights, num_items.to(weights.device, torch.float32),
        coefficients, tokens, rows, stride, given(ref_logprobs).stride(0),
        1.0 - spec.cliprange_low, 1.0 + spec.cliprange_high,
        float("inf") if spec.dual_clip is None else float(spec.dual_clip),
        float(spec.kl_coef), float(spec.old_kl_coef), float(spec.entropy_coef),
        LOSS=spec.loss, ESTIMATOR=_estimator(spec, ref_logprobs is not None, kl is not None),
        HAS_REF=ref_logprobs is not None, HAS_KL=kl is not None, HAS_ENTROPY=entropy is not None,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return coefficients, tokens


def policy_coefficients(
    spec: PolicyLossSpec,
    table: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    sequence_log_ratios: Tensor | None,
    weights: Tensor,
    num_items: int | Tensor,
    has_reference: bool,
) -> tuple[Tensor, Tensor]:
    """`policy_rows` of a table [n, TABLE_COLUMNS]; ref_logprobs, where given, replace its own."""
    if has_reference and ref_logprobs is None:
        ref_logprobs = table[:, REF_LOGPROB]
    return policy_rows(
        spec, table[:, LOGPROB], old_logprobs, advantages, weights, num_items,
        entropy=table[:, ENTROPY], kl=table[:, KL] if has_reference else None,
        ref_logprobs=ref_logprobs, sequence_log_ratios=sequence_log_ratios,
    )  # fmt: skip


def value_rows(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float | None,
) -> Tensor:
    """[N, 3]: loss, 1 where clipped, derivative of the loss in the value; zeros where masked."""
    tokens = torch.empty(values.numel(), 3, dtype=torch.float32, device=values.device)
    if values.numel():
        _value_kernel[(triton.cdiv(values.numel(), BLOCK),)](
            flat(values), flat(old_values), flat(returns), flat(mask), tokens, values.numel(),
            float("inf") if cliprange_value is None else float(cliprange_value),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return tokens


def _cases() -> Iterator[tuple[str, bool, bool]]:
    """Estimator, has_reference and has_kl, as `_estimator` lets them meet."""
    yield "k3", False, False
    yield "exact", False, True
    for estimator in KL_ESTIMATORS:
        yield estimator, True, True
    yield "k2", True, False
    yield "k3", True, False


def variants(target: str) -> Iterator[Variant]:
    del target  # one configuration serves all
    scalars = ("low", "high", "dual_clip", "kl_coef", "old_kl_coef", "entropy_coef")
    for loss, (estimator, ref, kl), entropy in product(LOSSES, _cases(), (False, True)):
        flags = {"HAS_REF": ref, "HAS_KL": kl, "HAS_ENTROPY": entropy}
        words = "".join(f" {name[4:].lower()}" for name, on in flags.items() if on)
        yield variant(
            _policy_kernel, "policy_rows", f"{BLOCK} w4 {loss} {estimator}{words}", "fp32",
            {"LOSS": loss, "ESTIMATOR": estimator, **flags, "BLOCK": BLOCK},
            dict.fromkeys(scalars, "fp32"), 4,
        )  # fmt: skip
    yield variant(
        _value_kernel, "value_rows", f"{BLOCK} w4", "fp32", {"BLOCK": BLOCK},
        {"mask_ptr": "*i1", "cliprange": "fp32"}, 4,
    )  # fmt: skip
