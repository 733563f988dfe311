"""The table of algorithms: a row says which advantages, which loss, and how tokens are averaged.

Whether there is a critic, and every coefficient, stands in the configuration, whose defaults by
algorithm are `algorithm_settings.DEFAULTS`. docs/math.md, section 9, has the table to read.
Deviations from the papers are said row by row; one is everybody's: the KL to the reference is what
`kl_estimator` says, in the reward (`k1`), in the loss (`k2`, `k3`), or exact and in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrlhf_kernels import PolicyLossSpec

from .advantages import (
    Advantages,
    gae_advantages,
    group_advantages,
    leave_one_out_advantages,
    mean_return,
    return_advantages,
)
from .config import PPOConfig
from .controllers import AlgorithmState
from .rewards.shaping import kl_reward, place_scores
from .types import Experience

__all__ = ["ALGORITHMS", "Algorithm"]

Learner = Callable[[Tensor, Experience, PPOConfig, AlgorithmState], Advantages]


@dataclass(frozen=True)
class Algorithm:
    """One row. ``equation`` is minimised, averaged over tokens as ``aggregation`` says."""

    name: str
    equation: str
    source: str
    deviation: str
    loss: str
    aggregation: str
    advantages: Learner

    def spec(self, config: PPOConfig, scale: float, state: AlgorithmState) -> PolicyLossSpec:
        """The policy loss of a rollout whose advantages were multiplied by ``scale``.

        A KL in the loss is weighed against the advantages, so it is scaled as they are.
        """
        in_loss = config.kl_estimator != "k1"
        high = config.cliprange_high
        return PolicyLossSpec(
            loss=self.loss,
            cliprange_low=config.cliprange,
            cliprange_high=config.cliprange if high is None else high,
            dual_clip=config.dual_clip,
            kl_coef=state.kl.coef * scale if in_loss else 0.0,
            kl_estimator=config.kl_estimator if in_loss else "exact",
            old_kl_coef=state.old_kl.coef if self.loss == "ppo_kl" else 0.0,
            entropy_coef=config.entropy_coef,
            aggregation=self.aggregation,
        )


def kl_rewards(experience: Experience, config: PPOConfig, state: AlgorithmState) -> Tensor:
    """The reward's share of the KL, [B, T]."""
    if state.kl.coef == 0:
        # The KL may not even have been measured.
        return torch.zeros_like(experience.old_logprobs)
    assert experience.kl is not None, "a reward with a KL needs a reference"
    return kl_reward(
        config.kl_estimator,
        state.kl.coef,
        config.gamma,
        kl=experience.kl,
        old_logprobs=experience.old_logprobs,
        ref_logprobs=experience.ref_logprobs,
        mask=experience.response_mask,
    )


def token_rewards(
    scores: Tensor, experience: Experience, config: PPOConfig, state: AlgorithmState
) -> Tensor:
    """Scores at the last token and the reward's share of the KL. [B] -> [B, T]."""
    rewards = kl_rewards(experience, config, state)
    return place_scores(rewards, scores, experience.response_mask)


def with_critic(
    scores: Tensor, experience: Experience, config: PPOConfig, state: AlgorithmState
) -> Advantages:
    """GAE over the rewards and the critic's values; REINFORCE's is that at lam 1, G - V."""
    assert experience.values is not None, "GAE needs a critic"
    return gae_advantages(
        token_rewards(scores, experience, config, state),
        experience.values,
        experience.response_mask,
        gamma=config.gamma,
        lam=1.0 if config.algorithm == "reinforce" else config.lam,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages,
    )


def with_baseline(
    scores: Tensor, experience: Experience, config: PPOConfig, state: AlgorithmState
) -> Advantages:
    """Returns less the configured baseline; the moving average is that of the rollouts before."""
    if config.baseline == "value":
        return with_critic(scores, experience, config, state)
    rewards, mask = token_rewards(scores, experience, config, state), experience.response_mask
    baselines = {
        "none": 0.0,
        "constant": config.baseline_constant,
        "batch_mean": None,
        "moving_average": state.returns.value,
    }
    learnt = return_advantages(
        rewards,
        baselines[config.baseline],
        mask,
        gamma=config.gamma,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages,
    )
    state.returns.update(float(mean_return(learnt.returns, mask)))
    return learnt


def groups_of(experience: Experience, config: PPOConfig) -> Tensor:
    """The prompt of each sequence, [B]: a prompt's completions are neighbours."""
    rows = torch.arange(len(experience), device=experience.response_mask.device)
    return rows // config.num_generations


def with_the_others(
    scores: Tensor, experience: Experience, config: PPOConfig, state: AlgorithmState
) -> Advantages:
    """The whole return of a sequence, less the mean of its prompt's other completions."""
    return leave_one_out_advantages(
        token_rewards(scores, experience, config, state).sum(1),
        groups_of(experience, config),
        experience.response_mask,
        whiten_advantages=config.whiten_advantages,
    )


def with_group(
    scores: Tensor, experience: Experience, config: PPOConfig, state: AlgorithmState
) -> Advantages:
    """The score, normalised among its prompt's completions; a KL in the reward is centred only."""
    return group_advantages(
        scores,
        kl_rewards(experience, config, state).sum(1),
        groups_of(experience, config),
        experience.response_mask,
        scale=config.scale_rewards,
        whiten_advantages=config.whiten_advantages,
    )


ROWS = (
    Algorithm(
        "reinforce", "−logprob·(G − b)", "Williams 1992",
        "divided by batch_size · response_length, a fixed number, instead of batch_size",
        "reinforce", "constant", with_baseline,
    ),
    Algorithm(
        "a2c", "−logprob·A, A of GAE (lam 0: the TD residual)", "Mnih et al. 2016",
        "whole episodes and λ-returns instead of n steps; Adam instead of RMSProp",
        "reinforce", "token_mean", with_critic,
    ),
    Algorithm(
        "ppo", "−min(r·A, clip(r, 1−ε, 1+ε_high)·A)", "Schulman et al. 2017, eq. 7",
        "advantages whitened over the rollout; clipped values and, where asked for, dual clip "
        "(Ye et al. 2020)",
        "ppo_clip", "token_mean", with_critic,
    ),
    Algorithm(
        "ppo_kl", "−r·A + β·KL(π_old‖π)", "Schulman et al. 2017, eq. 8",
        "KL by its sampled estimator r − 1 − log r; β adapts to the last minibatch's",
        "ppo_kl", "token_mean", with_critic,
    ),
    Algorithm(
        "rloo", "−min(r·A, clip(r)·A), A = R − mean of the others", "Ahmadian et al. 2024",
        "ratio and clip for later minibatches, a token at a time (TRL: a sequence at a time); "
        "divided by batch_size · response_length",
        "ppo_clip", "constant", with_the_others,
    ),
    Algorithm(
        "grpo", "−min(r·A, clip(r)·A), A = (R − mean)/std", "Shao et al. 2024, eq. 3",
        "unbiased std + 1e-4; kl_coef 0 unless given (TRL's defaults)",
        "ppo_clip", "sequence_mean", with_group,
    ),
    Algorithm(
        "dr_grpo", "−min(r·A, clip(r)·A), A = R − mean", "Liu et al. 2025",
        "none",
        "ppo_clip", "constant", with_group,
    ),
    Algorithm(
        "dapo", "−min(r·A, clip(r, 1−ε, 1+ε_high)·A), A = (R − mean)/std", "Yu et al. 2025",
        "groups without contrast are replaced at most dynamic_sampling times, then dropped; all of "
        "them dull: they are kept. The overlong penalty counts in the spread of scores",
        "ppo_clip", "token_mean", with_group,
    ),
    Algorithm(
        "gspo", "−min(s·A, clip(s)·A), s = exp(mean log r)", "Zheng et al. 2025, eq. 5",
        "unbiased std + 1e-4",
        "gspo", "sequence_mean", with_group,
    ),
    Algorithm(
        "cispo", "−sg(clip(r, 1−ε, 1+ε_high))·A·logprob", "MiniMax-M1 2025, eq. 4",
        "ε_high 4 as in ScaleRL (Khatri et al. 2025), where the paper gives none",
        "cispo", "token_mean", with_group,
    ),
)  # fmt: skip
ALGORITHMS = {row.name: row for row in ROWS}
