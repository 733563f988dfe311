"""From a rollout to what the update reads: the trunk at most once, then each role's share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf_kernels import PolicyLossSpec, linear_logprobs

from .backbone import Role, SharedBackbone
from .config import PPOConfig
from .losses import (
    MicrobatchLoss,
    head_arguments,
    microbatch_loss,
    reference_arguments,
    shares,
)
from .microbatches import Layout
from .trunk_cache import TrunkCache, on_device
from .types import Experience, Forward, Microbatch, Rollout

__all__ = ["TokenScores", "forward_inputs", "gather", "score", "score_tokens"]


class TokenScores(NamedTuple):
    """What scoring finds out about the n response tokens of a microbatch."""

    old_logprobs: Tensor  # [n] float32
    entropy: Tensor  # [n] float32
    kl: Tensor | None  # [n] float32
    ref_logprobs: Tensor | None  # [n] float32
    values: Tensor | None  # [n] float32
    ref_hidden: Tensor | None  # [n, D]


@torch.no_grad()
def score(
    backbone: SharedBackbone, rollout: Rollout, layouts: Iterable[Layout], config: PPOConfig
) -> Experience:
    """Old and reference log-probabilities, exact KL, entropy and values of a rollout.

    Args:
        layouts: the microbatches, which together are the batch. The update starts with the same,
            so its first ratios are 1 to the last bit.

    Returns:
        The experience, its advantages and returns not yet filled in. Where sampling kept no states
        of the trunk, those of these forwards are kept, unless ``config`` keeps none. With
        old_logprobs: sampled nothing is run.
    """
    if config.old_logprobs == "sampled":
        return as_sampled(rollout)
    batch, length = rollout.tokens.shape
    cache = rollout.trunk
    scored: list[TokenScores] = []
    places: list[Tensor] = []
    ref_hidden: Tensor | None = None
    for layout in layouts:
        forward = forward_inputs(backbone, rollout.tokens, layout, rollout.trunk)
        if rollout.trunk is None and config.trunk_cache and backbone.halves.split:
            states = forward.trunk
            cache = cache or TrunkCache(
                batch, length, states.shape[-1], dtype=states.dtype, device=states.device,
                budget_mb=config.trunk_cache_mb,
            )  # fmt: skip
            cache.write(layout, states)
        found = score_tokens(backbone, forward, config)
        if found.ref_hidden is not None:
            if ref_hidden is None:
                tokens = int(rollout.sequences.response_mask.sum())
                ref_hidden = found.ref_hidden.new_empty(tokens, found.ref_hidden.shape[-1])
            number = rollout.sequences.number[layout.response_index]
            ref_hidden.index_copy_(0, on_device(number, ref_hidden.device), found.ref_hidden)
        scored.append(found._replace(ref_hidden=None))
        places.append(layout.response_index)
    index = on_device(torch.cat(places), rollout.tokens.device)

    def spread(column: Callable[[TokenScores], Tensor | None]) -> Tensor | None:
        parts = [x for found in scored if (x := column(found)) is not None]
        if not parts:
            return None
        values = torch.cat(parts)
        return values.new_zeros(rollout.response_mask.numel()).index_copy_(0, index, values).view(
            rollout.response_mask.shape
        )  # fmt: skip

    old_logprobs, entropy = spread(lambda x: x.old_logprobs), spread(lambda x: x.entropy)
    assert old_logprobs is not None and entropy is not None
    zeros = torch.zeros_like(old_logprobs)
    return Experience(
        tokens=rollout.tokens,
        trunk=cache,
        sequences=rollout.sequences,
        response_mask=rollout.response_mask,
        old_logprobs=old_logprobs,
        ref_logprobs=spread(lambda x: x.ref_logprobs),
        ref_hidden=ref_hidden,
        kl=spread(lambda x: x.kl),
        entropy=entropy,
        values=spread(lambda x: x.values),
        advantages=zeros,
        returns=zeros,
    )


def as_sampled(rollout: Rollout) -> Experience:
    """What sampling alone knows of its rollout. The mean of the entropies is right, not each."""
    logprobs = rollout.rollout_logprobs
    zeros = torch.zeros_like(logprobs)
    return Experience(
        tokens=rollout.tokens,
        trunk=rollout.trunk,
        sequences=rollout.sequences,
        response_mask=rollout.response_mask,
        old_logprobs=logprobs,
        ref_logprobs=None,
        ref_hidden=None,
        kl=None,
        entropy=torch.where(rollout.response_mask, -logprobs, 0.0),
        values=None,
        advantages=zeros,
        returns=zeros,
    )


def forward_inputs(
    backbone: SharedBackbone, tokens: Tensor, layout: Layout, cache: TrunkCache | None
) -> Forward:
    """A microbatch of the sequences ``tokens`` [B, L]; without a cache the trunk is run for it."""
    device = tokens.device
    mask, position_ids = (
        None if x is None else on_device(x, device)
        for x in (layout.attention_mask, layout.position_ids)
    )
    if cache is None:
        index = on_device(layout.token_index.flatten(), device)
        inputs = tokens.flatten().index_select(0, index).view(layout.token_index.shape)
        trunk = backbone.trunk(inputs, mask, position_ids)
    else:
        trunk = cache.take(layout)
    responses = tokens.flatten().index_select(0, on_device(layout.target_index, device))
    return Forward(trunk, mask, position_ids, on_device(layout.state_index, device), responses)


def gather(backbone: SharedBackbone, experience: Experience, layout: Layout) -> Microbatch:
    """A microbatch of the experience."""
    forward = forward_inputs(backbone, experience.tokens, layout, experience.trunk)
    device = experience.tokens.device
    index = on_device(layout.response_index, device)

    def taken(column: Tensor) -> Tensor:
        return column.flatten().index_select(0, index)

    ref_hidden = experience.ref_hidden
    if ref_hidden is not None:
        number = experience.sequences.number[layout.response_index]
        ref_hidden = ref_hidden.index_select(0, on_device(number, device))
    return Microbatch(
        **vars(forward),
        sequence_ids=torch.div(index, experience.response_mask.shape[1], rounding_mode="floor"),
        response_mask=taken(experience.response_mask),
        old_logprobs=taken(experience.old_logprobs),
        advantages=taken(experience.advantages),
        returns=taken(experience.returns),
        values=None if experience.values is None else taken(experience.values),
        ref_logprobs=None if experience.ref_logprobs is None else taken(experience.ref_logprobs),
        ref_hidden=ref_hidden,
    )


def minibatch_losses(
    backbone: SharedBackbone,
    experience: Experience,
    layouts: Iterable[Layout],
    spec: PolicyLossSpec,
    config: PPOConfig,
    num_items: int,
    num_policy_items: int,
) -> Iterator[Callable[[], MicrobatchLoss]]:
    """What makes the shares of a minibatch's loss, each with a graph of its own; see `shares`.

    A microbatch is gathered when its first share is asked for, and once: without a trunk cache the
    frozen layers are run for it. ``num_items``, ``num_policy_items``: see `microbatch_loss`.
    """
    kinds, items = shares(backbone, config), (num_items, num_policy_items)
    for layout in layouts:
        batch = gather(backbone, experience, layout)
        for kind in kinds:
            yield partial(microbatch_loss, backbone, batch, spec, config, *items, kind)
        del batch


@torch.no_grad()
def score_tokens(backbone: SharedBackbone, forward: Forward, config: PPOConfig) -> TokenScores:
    """One forward of every role, whose layers are run side by side."""
    roles: list[Role] = ["policy"]
    if backbone.has_reference:
        roles.append("reference")
    if config.critic is not None and backbone.critic == "adapter":
        roles.append("critic")
    hidden = backbone.hidden_together(
        roles, forward.trunk, forward.attention_mask, forward.position_ids
    )
    ref_states = forward.states(hidden["reference"]) if backbone.has_reference else None
    policy = linear_logprobs(
        forward.states(hidden["policy"]),
        backbone.head.weight,
        forward.responses,
        **head_arguments(backbone, config),
        **reference_arguments(backbone, ref_states),
    )
    ref_logprobs, ref_hidden = None, None
    if ref_states is not None and config.kl_coef > 0:
        if config.kl_estimator == "exact":
            ref_hidden = ref_states
        else:
            ref_logprobs = reference_logprobs(backbone, ref_states, forward, config)
    values = None
    if config.critic is not None and backbone.value_head is not None:
        critic = hidden["critic"] if backbone.critic == "adapter" else hidden["policy"]
        values = forward.states(backbone.value_head(critic))
    return TokenScores(
        old_logprobs=policy.logprobs,
        entropy=policy.entropy,
        kl=policy.kl,
        ref_logprobs=ref_logprobs,
        values=values,
        ref_hidden=ref_hidden,
    )


def reference_logprobs(
    backbone: SharedBackbone, ref_states: Tensor, forward: Forward, config: PPOConfig
) -> Tensor:
    head = backbone.reference_head
    arguments = head_arguments(backbone, config) | {"bias": head.bias}
    return linear_logprobs(ref_states, head.weight, forward.responses, **arguments).logprobs
