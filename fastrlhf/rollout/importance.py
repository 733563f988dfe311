"""Truncated importance weights: what the engine drew, as if the policy had drawn it."""

from __future__ import annotations

from torch import Tensor

from ..config import PPOConfig
from ..types import Experience, Rollout

__all__ = ["importance_weights", "weighed"]


def weighed(
    advantages: Tensor, experience: Experience, rollout: Rollout, config: PPOConfig
) -> Tensor:
    """Advantages [B, T], weighed token by token where another engine than ours has sampled."""
    if config.engine == "fastrlhf":
        return advantages
    old, drawn = experience.old_logprobs, rollout.rollout_logprobs
    return advantages * importance_weights(old, drawn, config.importance_cap)


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_engine, cap) of every sampled token; shapes [B, T], float32.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training", with their truncation C as ``cap``.
    """
    return (old_logprobs - rollout_logprobs).exp().clamp_max(cap)
