"""The table of algorithms: a row says which advantages, which loss, and whether there is a critic.

ppo: Schulman et al. 2017. GAE whitened over the batch, clipped ratio and values. Deviation: the
KL to the reference is exact, split between reward and loss, unless `kl_estimator` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf_kernels import PolicyLossSpec

from .advantages import Advantages, gae_advantages
from .config import PPOConfig
from .rewards.shaping import kl_reward, place_scores
from .types import Experience

__all__ = ["ALGORITHMS", "Algorithm"]


@dataclass(frozen=True)
class Algorithm:
    """One row."""

    name: str
    loss: str
    advantages: Callable[[Tensor, Experience, PPOConfig], Advantages]
    needs_critic: bool

    def spec(self, config: PPOConfig, scale: float) -> PolicyLossSpec:
        """The policy loss of a rollout whose advantages were multiplied by ``scale``.

        A KL in the loss is weighed against the advantages, so it is scaled as they are.
        """
        in_loss = config.kl_estimator != "k1"
        return PolicyLossSpec(
            loss=self.loss,
            cliprange_low=config.cliprange,
            cliprange_high=config.cliprange,
            kl_coef=config.kl_coef * scale if in_loss else 0.0,
            kl_estimator=config.kl_estimator if in_loss else "exact",
            entropy_coef=config.entropy_coef,
            aggregation="token_mean",
        )


def token_rewards(scores: Tensor, experience: Experience, config: PPOConfig) -> Tensor:
    """Scores at the last token and the reward's share of the KL. [B] -> [B, T]."""
    if config.kl_coef == 0:
        # The KL may not even have been measured.
        rewards = torch.zeros_like(experience.old_logprobs)
        return place_scores(rewards, scores, experience.response_mask)
    assert experience.kl is not None, "a reward with a KL needs a reference"
    rewards = kl_reward(
        config.kl_estimator,
        config.kl_coef,
        config.gamma,
        kl=experience.kl,
        old_logprobs=experience.old_logprobs,
        ref_logprobs=experience.ref_logprobs,
        mask=experience.response_mask,
    )
    return place_scores(rewards, scores, experience.response_mask)


def with_critic(scores: Tensor, experience: Experience, config: PPOConfig) -> Advantages:
    """GAE over the rewards and the critic's values."""
    assert experience.values is not None, "GAE needs a critic"
    return gae_advantages(
        token_rewards(scores, experience, config),
        experience.values,
        experience.response_mask,
        gamma=config.gamma,
        lam=config.lam,
        whiten_rewards=config.whiten_rewards,
    )


ALGORITHMS = {
    "ppo": Algorithm("ppo", loss="ppo_clip", advantages=with_critic, needs_critic=True),
}
