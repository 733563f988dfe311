"""The loss of a microbatch: one pass through the trained layers, then the fused head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

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
from .types import Experience

if TYPE_CHECKING:
    from .backbone import SharedBackbone

__all__ = ["MicrobatchLoss", "microbatch_loss", "policy_items", "response_states"]


class MicrobatchLoss(NamedTuple):
    """A microbatch's share of its minibatch's loss; shares add up."""

    loss: Tensor  # [] policy.loss, and vf_coef · value.loss with a critic
    policy: LossOutput[LossStats]
    value: LossOutput[ValueStats] | None  # None without a critic
    grad_norm: Tensor | None = None  # [] before clipping, once the whole minibatch is in

    def detached(self) -> MicrobatchLoss:
        """The same numbers, which keep no graph alive."""
        return MicrobatchLoss(
            self.loss.detach(),
            self.policy._replace(loss=self.policy.loss.detach()),
            self.value and self.value._replace(loss=self.value.loss.detach()),
        )

    @staticmethod
    def added(parts: Sequence[MicrobatchLoss]) -> MicrobatchLoss:
        """The minibatch's losses and statistics."""

        def total(column: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(column)).sum()

        policies, values = [p.policy for p in parts], [p.value for p in parts if p.value]
        policy = LossStats(*map(total, zip(*(p.stats for p in policies), strict=True)))
        value = None
        if values:
            clipfrac = ValueStats(total(v.stats.clipfrac for v in values))
            value = LossOutput(total(v.loss for v in values), clipfrac)
        return MicrobatchLoss(
            total(p.loss for p in parts),
            LossOutput(total(p.loss for p in policies), policy),
            value,
        )


def response_states(hidden: Tensor, response_length: int) -> Tensor:
    """The states in which the response's tokens were drawn: [B, L, ...] -> [B, T, ...]."""
    return hidden[:, -response_length - 1 : -1]


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
    batch: Experience,
    spec: PolicyLossSpec,
    config: PPOConfig,
    num_items: int,
    num_policy_items: int | None = None,
) -> MicrobatchLoss:
    """Policy loss and, with a critic, value loss of ``batch``.

    Args:
        batch: some sequences of a minibatch.
        spec: the policy loss.
        num_items: response tokens in the whole minibatch, by which sums are divided.
        num_policy_items: of `policy_items`, where the policy loss is divided by something else.
    """
    length = batch.responses.shape[1]
    mask = batch.response_mask
    hidden = backbone.hidden("policy", batch.trunk, batch.attention_mask)
    head = backbone.head
    exact = spec.kl_coef > 0 and spec.kl_estimator == "exact"
    ref_hidden, ref_logprobs = batch.ref_hidden, batch.ref_logprobs
    items = num_items if num_policy_items is None else num_policy_items
    policy = linear_policy_loss(
        response_states(hidden, length)[mask],
        head.weight,
        batch.responses[mask],
        batch.old_logprobs[mask],
        batch.advantages[mask],
        mask[mask],
        spec,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=config.temperature,
        ref_logprobs=None if ref_logprobs is None else ref_logprobs[mask],
        ref_hidden=ref_hidden[mask] if exact and ref_hidden is not None else None,
        sequence_ids=torch.arange(len(batch), device=mask.device)[:, None].expand_as(mask)[mask],
        num_items=items,
        workspace_mb=config.workspace_mb,
    )
    if spec.aggregation == "constant":
        # Statistics are means over tokens, whatever the loss is divided by.
        stats = (x * (items / num_items) for x in policy.stats)
        policy = policy._replace(stats=LossStats(*stats))
    if config.critic is None:
        return MicrobatchLoss(policy.loss, policy, None)
    values = response_states(backbone.values(hidden, batch.trunk, batch.attention_mask), length)
    value = value_loss(
        values,
        batch.values,
        batch.returns,
        mask,
        cliprange_value=config.cliprange_value,
        num_items=num_items,
    )
    return MicrobatchLoss(policy.loss + config.vf_coef * value.loss, policy, value)
