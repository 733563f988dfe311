"""The loss of a microbatch: one pass through the trained layers, then the fused head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf_kernels import (
    LossOutput,
    LossStats,
    PolicyLossSpec,
    ValueStats,
    linear_policy_loss,
    value_loss,
)

from .config import PPOConfig
from .types import Microbatch

if TYPE_CHECKING:
    from .backbone import SharedBackbone

__all__ = [
    "MicrobatchLoss",
    "head_arguments",
    "microbatch_loss",
    "policy_items",
    "reference_arguments",
]


class MicrobatchLoss(NamedTuple):
    """A microbatch's share of its minibatch's loss; shares add up."""

    loss: Tensor  # [] policy.loss, and vf_coef · value.loss with a critic
    policy: LossOutput[LossStats]
    value: LossOutput[ValueStats] | None  # None without a critic
    grad_norm: Tensor | None = None  # [] before clipping, once the whole minibatch is in

    def detached(self) -> MicrobatchLoss:
        """The same numbers, which keep no graph alive."""
        value = self.value
        return MicrobatchLoss(
            self.loss.detach(),
            self.policy._replace(loss=self.policy.loss.detach()),
            None if value is None else value._replace(loss=value.loss.detach()),
        )

    @staticmethod
    def added(parts: Sequence[MicrobatchLoss]) -> MicrobatchLoss:
        """The minibatch's losses and statistics."""

        def total(column: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(column)).sum()

        policies = [p.policy for p in parts]
        values = [p.value for p in parts if p.value is not None]
        policy = LossStats(*map(total, zip(*(p.stats for p in policies), strict=True)))
        value = None
        if values:
            stats = ValueStats(*map(total, zip(*(v.stats for v in values), strict=True)))
            value = LossOutput(total(v.loss for v in values), stats)
        return MicrobatchLoss(
            total(p.loss for p in parts), LossOutput(total(p.loss for p in policies), policy), value
        )


def head_arguments(backbone: SharedBackbone, config: PPOConfig) -> dict[str, Any]:
    """How the fused ops take the policy's head, beside its weight."""
    head = backbone.head
    return {
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "temperature": config.temperature,
        "workspace_mb": config.workspace_mb,
    }


def reference_arguments(backbone: SharedBackbone, ref_hidden: Tensor | None) -> dict[str, Any]:
    """How they take the reference: its states ([n, D]), and its head where that is another."""
    if ref_hidden is None:
        return {"ref_hidden": None}
    head = backbone.reference_head
    # The ops multiply policy and reference with a shared head in one product.
    if head.weight is backbone.head.weight:
        return {"ref_hidden": ref_hidden}
    return {"ref_hidden": ref_hidden, "ref_weight": head.weight, "ref_bias": head.bias}


def policy_items(spec: PolicyLossSpec, mask: Tensor, response_length: int) -> int:
    """By what the policy loss of a minibatch is divided (docs/math.md, section 3.5).

    mask: [B, T] bool of the whole minibatch. response_length: tokens that a response may have.
    """
    if spec.aggregation == "token_mean":
        return int(mask.sum())
    sequences = int(mask.any(1).sum())
    return sequences if spec.aggregation == "sequence_mean" else sequences * response_length


def microbatch_loss(
    backbone: SharedBackbone,
    batch: Microbatch,
    spec: PolicyLossSpec,
    config: PPOConfig,
    num_items: int,
    num_policy_items: int | None = None,
) -> MicrobatchLoss:
    """Policy loss and, with a critic, value loss of ``batch``, which is a part of a minibatch.

    Args:
        spec: the policy loss.
        num_items: response tokens in the whole minibatch, by which sums are divided.
        num_policy_items: of `policy_items`, where the policy loss is divided by something else.
    """
    inputs = (batch.trunk, batch.attention_mask, batch.position_ids)
    hidden = backbone.hidden("policy", *inputs)
    exact = spec.kl_coef > 0 and spec.kl_estimator == "exact"
    items = num_items if num_policy_items is None else num_policy_items
    policy = linear_policy_loss(
        batch.states(hidden),
        backbone.head.weight,
        batch.responses,
        batch.old_logprobs,
        batch.advantages,
        batch.response_mask,
        spec,
        ref_logprobs=batch.ref_logprobs,
        sequence_ids=batch.sequence_ids,
        num_items=items,
        **head_arguments(backbone, config),
        **reference_arguments(backbone, batch.ref_hidden if exact else None),
    )
    if spec.aggregation == "constant":
        # Statistics are means over tokens, whatever the loss is divided by.
        stats = (x * (items / num_items) for x in policy.stats)
        policy = policy._replace(stats=LossStats(*stats))
    if batch.values is None:
        return MicrobatchLoss(policy.loss, policy, None)
    value = value_loss(
        batch.states(backbone.values(hidden, *inputs)),
        batch.values,
        batch.returns,
        batch.response_mask,
        cliprange_value=config.cliprange_value,
        num_items=num_items,
    )
    return MicrobatchLoss(policy.loss + config.vf_coef * value.loss, policy, value)
