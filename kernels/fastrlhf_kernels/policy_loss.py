"""Policy and value losses of [N] vectors: what remains once the vocabulary is reduced.

One sweep for loss, statistics and derivatives with `cpu`, one launch with `triton`; elsewhere plain
torch, as under torch.compile, which fuses it. Deviation from PPO's paper: the clip range may be
asymmetric, and an upper bound for negative advantages ("dual clip") is on offer. Formulas:
docs/math.md, section 3.
"""

import math

import torch
from torch import Tensor

from . import _cpu_tokens, token_losses
from ._backend import check_device, check_mask, check_same_shape, compute_dtype, resolve
from ._records import LossOutput, LossStats, PolicyLossSpec, ValueStats


def check_policy_inputs(
    op: str,
    logprobs_or_targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    spec: PolicyLossSpec,
    *,
    ref_logprobs: Tensor | None,
    has_entropy: bool,
    has_kl: bool,
    has_ref_logprobs: bool,
    sequence_ids: Tensor | None,
    num_items: int | Tensor | None,
) -> None:
    """One shape for all, and everything that the spec needs."""
    check_mask(op, mask)
    check_same_shape(
        op, tokens=logprobs_or_targets, old_logprobs=old_logprobs, advantages=advantages,
        mask=mask, ref_logprobs=ref_logprobs, sequence_ids=sequence_ids,
    )  # fmt: skip
    if spec.entropy_coef and not has_entropy:
        raise ValueError(f"{op}: entropy_coef={spec.entropy_coef} needs entropy")
    if spec.kl_coef and spec.kl_estimator == "exact" and not has_kl:
        raise ValueError(
            f"{op}: kl_coef={spec.kl_coef} with kl_estimator='exact' needs the exact KL: "
            "ref_hidden for linear_policy_loss, kl for policy_loss"
        )
    if spec.kl_coef and spec.kl_estimator != "exact" and not has_ref_logprobs:
        raise ValueError(
            f"{op}: kl_coef={spec.kl_coef} with kl_estimator={spec.kl_estimator!r} needs "
            "ref_logprobs"
        )
    by_sequence = spec.loss == "gspo" or spec.aggregation == "sequence_mean"
    if by_sequence and sequence_ids is None and mask.dim() != 2:
        raise ValueError(
            f"{op}: loss={spec.loss!r} with aggregation={spec.aggregation!r} needs sequence_ids or "
            f"[B, T] inputs, got mask {list(mask.shape)}"
        )
    if spec.aggregation == "constant" and num_items is None:
        raise ValueError(f"{op}: aggregation='constant' needs num_items: sequences × their length")
    check_num_items(op, num_items)


def check_num_items(op: str, num_items: int | Tensor | None) -> None:
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"{op}: num_items is 0-dim, got {list(num_items.shape)}")
    elif num_items is not None and not num_items > 0:
        raise ValueError(f"{op}: num_items={num_items!r} must be > 0")


def _valid_rows(rows: Tensor, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.reshape(-1)[rows].to(dtype)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    spec: PolicyLossSpec,
    *,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    kl: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> LossOutput[LossStats]:
    """`-torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)[mask].sum() / num_items`.

    r = exp(logprobs − old_logprobs), A = advantages.
    All tensors are [N], or any one shape; `mask` is bool, True = trains, and rows with False are
    never read. Differentiable in `logprobs`, `entropy` and `kl`. float32 inside, float64 for
    float64 inputs. `spec` adds − entropy_coef·entropy and + kl_coef·KL and says how to aggregate;
    `num_items` is the denominator of the whole minibatch: tokens, sequences for "sequence_mean",
    sequences × the fixed length for "constant"; None counts this call. A sequence stays within one
    call under "sequence_mean" and with "gspo"; `sequence_ids` may be left out for [B, T] inputs.

    Raises ValueError for shapes that differ, and for what the spec needs and is not given.
    Source: Schulman et al. 2017, eq. 7; docs/math.md, section 3.
    """
    op = "policy_loss"
    check_policy_inputs(
        op, logprobs, old_logprobs, advantages, mask, spec, ref_logprobs=ref_logprobs,
        has_entropy=entropy is not None, has_kl=kl is not None,
        has_ref_logprobs=ref_logprobs is not None, sequence_ids=sequence_ids, num_items=num_items,
    )  # fmt: skip
    check_same_shape(op, logprobs=logprobs, entropy=entropy, kl=kl)
    dtype = compute_dtype(logprobs, old_logprobs, advantages, ref_logprobs, entropy, kl)
    backend = resolve(
        backend, logprobs.device, dtype, op=op,
        unsupported="torch.compile" if torch.compiler.is_compiling() else None,
    )  # fmt: skip
    if backend == "triton":
        from . import _triton_losses

        return _triton_losses.policy_loss(
            logprobs, old_logprobs, advantages, mask, spec, ref_logprobs=ref_logprobs,
            entropy=entropy, kl=kl, sequence_ids=sequence_ids, num_items=num_items,
        )  # fmt: skip
    if backend == "cpu":
        return _cpu_tokens.policy_loss(
            spec, logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs,
            entropy=entropy, kl=kl, sequence_ids=sequence_ids, num_items=num_items,
        )  # fmt: skip
    rows = mask.reshape(-1).nonzero().squeeze(-1)
    given = [
        _valid_rows(rows, x, dtype)
        for x in (logprobs, old_logprobs.detach(), advantages.detach(), entropy, kl)
    ]
    reference_rows = _valid_rows(rows, ref_logprobs, dtype)
    log_ratios = None
    if spec.loss == "gspo":
        log_ratios = token_losses.sequence_log_ratios(
            given[0], given[1], mask, sequence_ids  # type: ignore[arg-type]
        )  # fmt: skip
    tokens = token_losses.policy_rows(
        spec, given[0], given[1], given[2], entropy=given[3], kl=given[4],  # type: ignore[arg-type]
        ref_logprobs=None if reference_rows is None else reference_rows.detach(),
        sequence_log_ratios=log_ratios,
    )  # fmt: skip
    mean = token_losses.row_mean(mask, spec.aggregation, sequence_ids, num_items, dtype)
    return token_losses.reduce_policy_rows(tokens, mean)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float | None,
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> LossOutput[ValueStats]:
    """`torch.maximum((V - R)**2, (V.clamp(V_old - c, V_old + c) - R)**2)[mask].mean() / 2`.

    All tensors are [N], or any one shape; `mask` is bool and rows with False are never read.
    Differentiable in `values`. `cliprange_value=None` does not clip. `num_items` is the number of
    valid tokens of the whole minibatch; None counts this call. The caller multiplies by vf_coef.

    Raises ValueError for shapes that differ and a cliprange_value that is not > 0.
    Source: docs/math.md, section 3 (value).
    """
    op = "value_loss"
    check_mask(op, mask)
    check_same_shape(op, values=values, old_values=old_values, returns=returns, mask=mask)
    check_device(op, values=values, mask=mask)
    check_num_items(op, num_items)
    if cliprange_value is not None and not 0 < cliprange_value < math.inf:
        raise ValueError(
            f"{op}: cliprange_value={cliprange_value!r} must be finite and > 0, or None"
        )
    dtype = compute_dtype(values, old_values, returns)
    backend = resolve(
        backend, values.device, dtype, op=op,
        unsupported="torch.compile" if torch.compiler.is_compiling() else None,
    )  # fmt: skip
    if backend == "cpu":
        return _cpu_tokens.value_loss(values, old_values, returns, mask, cliprange_value, num_items)
    if backend == "triton":
        from . import _triton_losses

        return _triton_losses.value_loss(
            values, old_values, returns, mask, cliprange_value=cliprange_value, num_items=num_items
        )
    rows = mask.reshape(-1).nonzero().squeeze(-1)
    new, old, target = (
        x.reshape(-1)[rows].to(dtype) for x in (values, old_values.detach(), returns.detach())
    )
    mean = token_losses.row_mean(mask, "token_mean", None, num_items, dtype)
    return token_losses.value_loss(new, old, target, mean, cliprange_value)
