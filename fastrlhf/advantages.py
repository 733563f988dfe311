"""Advantages of an episode's tokens, and by how much they were scaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf_kernels import gae, whiten
from fastrlhf_kernels.reference import masked_moments

__all__ = ["Advantages", "explained_variance", "gae_advantages"]


@dataclass(frozen=True)
class Advantages:
    """What the policy and the critic learn from."""

    advantages: Tensor  # [B, T] whitened
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
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016), whitened over the batch.

    Args:
        rewards, values: [B, T]. mask: [B, T] bool, True on response tokens.
        whiten_rewards: divide the rewards by their standard deviation first, keeping the mean.
    """
    scale = rewards.new_ones(())
    if whiten_rewards:
        scale = scale * masked_moments(rewards, mask).rstd
        rewards = whiten(rewards, mask, center=False)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    scale = scale * masked_moments(advantages, mask).rstd
    return Advantages(whiten(advantages, mask), returns, scale)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over valid tokens; 0 where returns do not vary."""
    returns, values = returns[mask], values[mask]
    if len(returns) < 2:
        return 0.0
    variance = torch.var(returns)
    if variance == 0:
        return 0.0
    return float(1 - torch.var(returns - values) / variance)
