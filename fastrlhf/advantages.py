"""Advantages of an episode's tokens, and by how much they were scaled.

Pure functions of [B, T] rewards and values, or of [B] scores and groups (docs/math.md, sections 4
and 9). Sequences without a valid token take no part in any mean or deviation, and get 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf_kernels import gae, whiten
from fastrlhf_kernels.reference import masked_moments

__all__ = [
    "Advantages",
    "equal_scores",
    "explained_variance",
    "gae_advantages",
    "group_advantages",
    "leave_one_out_advantages",
    "mean_return",
    "return_advantages",
]


@dataclass(frozen=True)
class Advantages:
    """What the policy and the critic learn from."""

    advantages: Tensor  # [B, T] whitened where asked for
    returns: Tensor  # [B, T] in units of the (whitened, where asked for) rewards
    scale: Tensor  # [] by what whitening multiplied; a KL in the loss is multiplied by it too


def gae_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016); lam 0 is the TD residual.

    Args:
        rewards, values: [B, T]. mask: [B, T] bool, True on response tokens.
        whiten_rewards: divide the rewards by their standard deviation first, keeping the mean.
        whiten_advantages: over the batch's tokens.
    """
    rewards, scale = scaled_rewards(rewards, mask, whiten_rewards)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    return whitened(Advantages(advantages, returns, scale), mask, whiten_advantages)


def return_advantages(
    rewards: Tensor,
    baseline: float | None,
    mask: Tensor,
    *,
    gamma: float,
    whiten_rewards: bool = False,
    whiten_advantages: bool = False,
) -> Advantages:
    """`A_t = G_t - b` with the discounted return G of what follows (Williams 1992).

    Args:
        rewards: [B, T]. mask: [B, T] bool.
        baseline: in units of the (whitened, where asked for) rewards; None is `mean_return`.
    """
    rewards, scale = scaled_rewards(rewards, mask, whiten_rewards)
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    level = mean_return(returns, mask) if baseline is None else baseline
    advantages = torch.where(mask, returns - level, 0.0)
    return whitened(Advantages(advantages, returns, scale), mask, whiten_advantages)


def mean_return(returns: Tensor, mask: Tensor) -> Tensor:
    """Mean over sequences of the return at their first token. [B, T] -> []."""
    first = returns.gather(1, mask.to(torch.int8).argmax(1, keepdim=True)).squeeze(1)
    valid = mask.any(1)
    return torch.where(valid, first, 0.0).sum() / valid.sum().clamp(min=1)


def leave_one_out_advantages(
    scores: Tensor, groups: Tensor, mask: Tensor, *, whiten_advantages: bool = False
) -> Advantages:
    """`A_i = R_i - mean of R_j over the others of i's group`, at every token of sequence i.

    Args:
        scores: [B]. groups: [B] int64, the prompt of each. mask: [B, T] bool.
        A sequence that is alone in its group has nothing to be compared with: its advantage is 0.

    Source: Ahmadian et al. 2024, section 3.2.
    """
    of_group = GroupMoments.of(scores, groups, mask.any(1))
    count = of_group.count
    unlike = (scores - of_group.mean) * count / (count - 1).clamp(min=1)
    return whitened(spread(unlike, scores, mask), mask, whiten_advantages)


def group_advantages(
    scores: Tensor,
    kl_returns: Tensor,
    groups: Tensor,
    mask: Tensor,
    *,
    scale: str = "group",
    whiten_advantages: bool = False,
) -> Advantages:
    """`A_i = (R_i - mean of the group) / (std + 1e-4)`, at every token of sequence i.

    Args:
        scores: [B]. groups: [B] int64, the prompt of each. mask: [B, T] bool.
        kl_returns: [B] the KL's share of the return; centred by group and added, never divided.
        scale: whose unbiased standard deviation divides: "group", "batch" or "none".

    Source: Shao et al. 2024, section 4.1.2; "none": Liu et al. 2025.
    """
    valid = mask.any(1)
    of_group = GroupMoments.of(scores, groups, valid)
    advantages = scores - of_group.mean
    if scale == "group":
        advantages = advantages / (of_group.deviation + 1e-4)
    elif scale == "batch":
        everyone = GroupMoments.of(scores, torch.zeros_like(groups), valid)
        advantages = advantages / (everyone.deviation + 1e-4)
    kl_part = kl_returns - GroupMoments.of(kl_returns, groups, valid).mean
    return whitened(spread(advantages + kl_part, scores, mask), mask, whiten_advantages)


def equal_scores(scores: Tensor, size: int) -> Tensor:
    """Which groups of ``size`` in a row hold no two different scores. [B] -> [B / size] bool.

    NaN, an unjudged sequence, is no score.
    """
    rows = scores.view(-1, size)
    unjudged = rows.isnan()
    low = rows.masked_fill(unjudged, torch.inf).amin(1)
    high = rows.masked_fill(unjudged, -torch.inf).amax(1)
    return ~(low < high)


@dataclass(frozen=True)
class GroupMoments:
    """Of each sequence's group, float64 inside so that equal scores deviate by exactly 0."""

    mean: Tensor  # [B]
    deviation: Tensor  # [B] unbiased; of a single one 0
    count: Tensor  # [B]

    @classmethod
    def of(cls, x: Tensor, groups: Tensor, valid: Tensor) -> GroupMoments:
        """x: [B]. groups: [B] int64. valid: [B] bool, who is counted."""
        # Products with who is with whom: sums in a fixed order, also on a GPU.
        together = ((groups[:, None] == groups) & valid).double()
        count = together.sum(1)
        wide = x.double().masked_fill(~valid, 0.0)
        mean = together @ wide / count.clamp(min=1)
        gaps = together * (wide - mean[:, None]).square()
        deviation = (gaps.sum(1) / (count - 1).clamp(min=1)).sqrt()
        return cls(mean, deviation, count)


def spread(per_sequence: Tensor, like: Tensor, mask: Tensor) -> Advantages:
    """[B] advantages at every valid token."""
    advantages = torch.where(mask, per_sequence.to(like.dtype)[:, None], 0.0)
    return Advantages(advantages, advantages, advantages.new_ones(()))


def scaled_rewards(rewards: Tensor, mask: Tensor, divide: bool) -> tuple[Tensor, Tensor]:
    """The rewards and by what they were multiplied."""
    if not divide:
        return rewards, rewards.new_ones(())
    return whiten(rewards, mask, center=False), masked_moments(rewards, mask).rstd


def whitened(learnt: Advantages, mask: Tensor, wanted: bool) -> Advantages:
    """Advantages with mean 0 and deviation 1, where ``wanted``, and their scale with it."""
    if not wanted:
        return learnt
    rstd = masked_moments(learnt.advantages, mask).rstd
    return Advantages(whiten(learnt.advantages, mask), learnt.returns, learnt.scale * rstd)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over valid tokens; 0 where returns do not vary."""
    returns, values = returns[mask], values[mask]
    if len(returns) < 2:
        return 0.0
    variance = torch.var(returns)
    if variance == 0:
        return 0.0
    return float(1 - torch.var(returns - values) / variance)
