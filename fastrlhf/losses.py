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

__all__ = ["MicrobatchLoss", "microbatch_loss", "response_states"]


class MicrobatchLoss(NamedTuple):
    """A microbatch's share of its minibatch's loss; shares add up."""

    loss: Tensor  # [] policy.loss + vf_coef · value.loss
    policy: LossOutput[LossStats]
    value: LossOutput[ValueStats]
    grad_norm: Tensor | None = None  # [] before clipping, once the whole minibatch is in

    def detached(self) -> MicrobatchLoss:
        """The same numbers, which keep no graph alive."""
        return MicrobatchLoss(
            self.loss.detach(),
            self.policy._replace(loss=self.policy.loss.detach()),
            self.value._replace(loss=self.value.loss.detach()),
        )

    @staticmethod
    def added(parts: Sequence[MicrobatchLoss]) -> MicrobatchLoss:
        """The minibatch's losses and statistics."""

        def total(column: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(column)).sum()

        policies, values = [p.policy for p in parts], [p.value for p in parts]
        policy = LossStats(*map(total, zip(*(p.stats for p in policies), strict=True)))
        value = ValueStats(*map(total, zip(*(v.stats for v in values), strict=True)))
        return MicrobatchLoss(
            total(p.loss for p in parts),
            LossOutput(total(p.loss for p in policies), policy),
            LossOutput(total(v.loss for v in values), value),
        )


def response_states(hidden: Tensor, response_length: int) -> Tensor:
    """The states in which the response's tokens were drawn: [B, L, ...] -> [B, T, ...]."""
    return hidden[:, -response_length - 1 : -1]


def microbatch_loss(
    backbone: SharedBackbone,
    batch: Experience,
    spec: PolicyLossSpec,
    config: PPOConfig,
    num_items: int,
) -> MicrobatchLoss:
    """Policy and value loss of ``batch``.

    Args:
        batch: some sequences of a minibatch.
        spec: the policy loss.
        num_items: response tokens in the whole minibatch, by which sums are divided.
    """
    length = batch.responses.shape[1]
    mask = batch.response_mask
    hidden = backbone.hidden("policy", batch.trunk, batch.attention_mask)
    head = backbone.head
    exact = spec.kl_coef > 0 and spec.kl_estimator == "exact"
    ref_hidden, ref_logprobs = batch.ref_hidden, batch.ref_logprobs
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
        num_items=num_items,
        workspace_mb=config.workspace_mb,
    )
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
