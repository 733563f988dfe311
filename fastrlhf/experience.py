"""From a rollout to what the update reads: the trunk at most once, then each role's share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastrlhf_kernels import linear_logprobs

from .backbone import SharedBackbone
from .config import PPOConfig
from .losses import response_states
from .types import Experience, Rollout

__all__ = ["microbatches", "score"]


def microbatches(rows: Tensor, length: int, token_budget: int) -> list[Tensor]:
    """Split the sequences ``rows`` so that each part has at most ``token_budget`` tokens.

    Args:
        rows: [n] int64. length: padded tokens of a sequence. A part has at least one sequence.
    """
    return list(rows.split(max(1, token_budget // length)))


@torch.no_grad()
def score(
    backbone: SharedBackbone, rollout: Rollout, parts: Iterable[Tensor], config: PPOConfig
) -> Experience:
    """Old and reference log-probabilities, exact KL, entropy and values of a rollout.

    Args:
        parts: the sequences of each forward, which together are the batch. The update starts with
            the same parts, so its first ratios are 1 to the last bit.

    Returns:
        The experience in the batch's order, its advantages and returns not yet filled in.
    """
    parts = list(parts)
    scored = [score_part(backbone, rollout, rows, config) for rows in parts]
    return Experience.concatenate(scored, torch.cat(parts))


def score_part(
    backbone: SharedBackbone, rollout: Rollout, rows: Tensor, config: PPOConfig
) -> Experience:
    attention_mask = rollout.attention_mask[rows]
    responses, mask = rollout.responses[rows], rollout.response_mask[rows]
    length = responses.shape[1]
    if rollout.trunk is None:
        trunk = backbone.trunk(rollout.tokens[rows], attention_mask)
    else:
        trunk = rollout.trunk[rows]
    hidden = backbone.hidden("policy", trunk, attention_mask)
    values = torch.zeros(mask.shape, device=mask.device)
    if config.critic is not None:
        values = response_states(backbone.values(hidden, trunk, attention_mask), length)
    states = response_states(hidden, length)
    ref_states = response_states(backbone.hidden("reference", trunk, attention_mask), length)
    head = backbone.head

    def statistics(hidden: Tensor, ref_hidden: Tensor | None):
        return linear_logprobs(
            hidden,
            head.weight,
            responses[mask],
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            temperature=config.temperature,
            ref_hidden=ref_hidden,
            workspace_mb=config.workspace_mb,
        )

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(mask.shape).masked_scatter(mask, x)

    policy = statistics(states[mask], ref_states[mask])
    assert policy.kl is not None
    exact = config.kl_estimator == "exact"
    zeros = torch.zeros_like(values)
    return Experience(
        trunk=trunk,
        attention_mask=attention_mask,
        responses=responses,
        response_mask=mask,
        old_logprobs=spread(policy.logprobs),
        ref_logprobs=None if exact else spread(statistics(ref_states[mask], None).logprobs),
        ref_hidden=ref_states.contiguous() if exact else None,
        kl=spread(policy.kl),
        entropy=spread(policy.entropy),
        values=values,
        advantages=zeros,
        returns=zeros,
    )
