"""The loss of a microbatch: a pass through the trained layers, then the fused head.

A critic with an adapter of its own makes a second pass, whose loss is a share by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
    "MinibatchLoss",
    "head_arguments",
    "microbatch_loss",
    "policy_items",
    "reference_arguments",
    "shares",
]


ROLES = ("policy", "critic")
Share = Literal["both", "policy", "value"]
"""Of what a loss is made: policy loss and, with a critic, value loss; or one of them."""


class MicrobatchLoss(NamedTuple):
    """A share of a minibatch's loss; shares add up to a `MinibatchLoss`."""

    loss: Tensor  # [] policy.loss, vf_coef · value.loss, or their sum
    policy: LossOutput[LossStats] | None
    value: LossOutput[ValueStats] | None

    def detached(self) -> MicrobatchLoss:
        """The same numbers, which keep no graph alive."""
        policy, value = self.policy, self.value
        return MicrobatchLoss(
            self.loss.detach(),
            None if policy is None else policy._replace(loss=policy.loss.detach()),
            None if value is None else value._replace(loss=value.loss.detach()),
        )


class MinibatchLoss(NamedTuple):
    """The loss of a minibatch."""

    loss: Tensor  # []
    policy: LossOutput[LossStats]
    value: LossOutput[ValueStats] | None  # None without a critic
    grad_norm: Tensor | None = None  # [] before clipping

    @staticmethod
    def of(parts: Sequence[MicrobatchLoss]) -> MinibatchLoss:
        """The sum of its shares."""

        def total(column: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(column)).sum()

        policies = [p.policy for p in parts if p.policy is not None]
        values = [p.value for p in parts if p.value is not None]
        policy = LossStats(*map(total, zip(*(p.stats for p in policies), strict=True)))
        value = None
        if values:
            stats = ValueStats(*map(total, zip(*(v.stats for v in values), strict=True)))
            value = LossOutput(total(v.loss for v in values), stats)
        return MinibatchLoss(
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


def shares(backbone: SharedBackbone, config: PPOConfig) -> tuple[Share, ...]:
    """In what shares a microbatch's loss is best made, each with a graph of its own.

    A critic with an adapter of its own runs through the trained layers by itself, so that one of
    the two graphs is held at a time. Not where weights are stepped in the backward: there is one.
    """
    apart = config.critic is not None and backbone.critic == "adapter"
    # Where one of them does not train, its share would have nothing to differentiate.
    both = all(any(p.requires_grad for p in backbone.role_parameters(role)) for role in ROLES)
    one_pass = config.optimizer_in_backward
    return ("policy", "value") if apart and both and not one_pass else ("both",)


def microbatch_loss(
    backbone: SharedBackbone,
    batch: Microbatch,
    spec: PolicyLossSpec,
    config: PPOConfig,
    num_items: int,
    num_policy_items: int | None = None,
    share: Share = "both",
) -> MicrobatchLoss:
    """Policy loss and, with a critic, value loss of ``batch``, which is a part of a minibatch.

    Args:
        spec: the policy loss.
        num_items: response tokens in the whole minibatch, by which sums are divided.
        num_policy_items: of `policy_items`, where the policy loss is divided by something else.
        share: one of `shares`; a shared critic's value reads the policy's states: ask for both.
    """
    inputs = (batch.trunk, batch.attention_mask, batch.position_ids)
    if share == "value":
        value = critic_loss(batch, backbone.values(batch.trunk, *inputs), config, num_items)
        return MicrobatchLoss(config.vf_coef * value.loss, None, value)
    hidden = backbone.hidden("policy", *inputs)
    items = num_items if num_policy_items is None else num_policy_items
    policy = actor_loss(backbone, batch, hidden, spec, config, items)
    if spec.aggregation == "constant":
        # Statistics are means over tokens, whatever the loss is divided by.
        stats = (x * (items / num_items) for x in policy.stats)
        policy = policy._replace(stats=LossStats(*stats))
    if share == "policy" or batch.values is None:
        return MicrobatchLoss(policy.loss, policy, None)
    value = critic_loss(batch, backbone.values(hidden, *inputs), config, num_items)
    return MicrobatchLoss(policy.loss + config.vf_coef * value.loss, policy, value)


def actor_loss(
    backbone: SharedBackbone,
    batch: Microbatch,
    hidden: Tensor,
    spec: PolicyLossSpec,
    config: PPOConfig,
    num_items: int,
) -> LossOutput[LossStats]:
    """The policy loss of the final states ``hidden``, [B, L, D]."""
    exact = spec.kl_coef > 0 and spec.kl_estimator == "exact"
    return linear_policy_loss(
        batch.states(hidden),
        backbone.head.weight,
        batch.responses,
        batch.old_logprobs,
        batch.advantages,
        batch.response_mask,
        spec,
        ref_logprobs=batch.ref_logprobs,
        sequence_ids=batch.sequence_ids,
        num_items=num_items,
        weight_grad=head_gradient(backbone, config),
        **head_arguments(backbone, config),
        **reference_arguments(backbone, batch.ref_hidden if exact else None),
    )


def head_gradient(backbone: SharedBackbone, config: PPOConfig) -> Tensor | None:
    """Where the head's gradient is summed over microbatches, if the loss may add to it at once.

    In 16 bits the sum would be too coarse, and what is stepped in the backward has to arrive there.
    The op adds to contiguous tensors only.
    """
    weight = backbone.head.weight
    trains = torch.is_grad_enabled() and weight.requires_grad
    fits = weight.dtype == torch.float32 and weight.is_contiguous()
    if not trains or not fits or config.optimizer_in_backward:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def critic_loss(
    batch: Microbatch, values: Tensor, config: PPOConfig, num_items: int
) -> LossOutput[ValueStats]:
    """The value loss of the ``values`` of all positions, [B, L]."""
    assert batch.values is not None
    return value_loss(
        batch.states(values),
        batch.values,
        batch.returns,
        batch.response_mask,
        cliprange_value=config.cliprange_value,
        num_items=num_items,
    )
