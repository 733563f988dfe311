"""A row of the table: how scores become advantages, and that the KL is weighed as they are."""

from dataclasses import replace

import pytest
import torch

from fastrlhf.advantages import explained_variance, gae_advantages
from fastrlhf.algorithms import ALGORITHMS
from fastrlhf.config import PPOConfig
from fastrlhf.controllers import AlgorithmState
from fastrlhf.microbatches import Sequences
from fastrlhf.types import Experience
from fastrlhf_kernels import PolicyLossSpec, gae, linear_policy_loss, whiten

B, T, D, V = 6, 5, 8, 11
CONFIG = PPOConfig(kl_coef=0.3, gamma=0.9, lam=0.8, cliprange=0.3)
STATE = AlgorithmState.of(CONFIG)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.arange(T) < torch.tensor([5, 3, 5, 1, 4, 2])[:, None]


def experience() -> Experience:
    return Experience(
        tokens=torch.zeros(B, T, dtype=torch.long), trunk=None, sequences=Sequences(MASK, MASK),
        response_mask=MASK, old_logprobs=-draw(B, T, seed=1).abs(), ref_logprobs=None,
        ref_hidden=None, kl=draw(B, T, seed=3).abs(), entropy=draw(B, T).abs(),
        values=draw(B, T, seed=4), advantages=torch.zeros(B, T), returns=torch.zeros(B, T),
    )  # fmt: skip


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_scale_is_what_whitening_multiplied_by(whiten_rewards):
    rewards, values = draw(B, T), draw(B, T, seed=4)
    learnt = gae_advantages(
        rewards, values, MASK, gamma=0.9, lam=0.8, whiten_rewards=whiten_rewards
    )
    if whiten_rewards:
        rewards = whiten(rewards, MASK, center=False)
    raw, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    torch.testing.assert_close(learnt.returns, returns)
    # Whitening also removes the mean: differences tell the scale.
    a, b = learnt.advantages[0, 0] - learnt.advantages[2, 1], raw[0, 0] - raw[2, 1]
    expected = a / b
    if whiten_rewards:
        deviation = draw(B, T)[MASK].std()
        expected = expected / deviation
    torch.testing.assert_close(learnt.scale, expected, rtol=1e-6, atol=1e-6)


def gradient(advantages: torch.Tensor, spec: PolicyLossSpec) -> torch.Tensor:
    """Of the policy loss at ratio 1, where only advantages and KL make it."""
    hidden, weight = draw(B, T, D, seed=5).requires_grad_(), draw(V, D, seed=6)
    targets = torch.zeros(B, T, dtype=torch.long)
    old = (hidden.detach() @ weight.T).log_softmax(-1)[..., 0]
    loss = linear_policy_loss(
        hidden, weight, targets, old, advantages, MASK, spec, ref_hidden=draw(B, T, D, seed=7)
    ).loss
    return torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_whitening_scales_the_whole_objective(whiten_rewards):
    """Up to the mean it removes, the whitened loss is `scale` times the plain one."""
    config = replace(CONFIG, whiten_rewards=whiten_rewards)
    ppo = ALGORITHMS["ppo"]
    learnt = ppo.advantages(draw(B, seed=8), experience(), config, STATE)
    scale = float(learnt.scale)
    shift = learnt.advantages / scale
    whitened = gradient(learnt.advantages, ppo.spec(config, scale, STATE))
    plain = gradient(shift, ppo.spec(config, 1.0, STATE))
    torch.testing.assert_close(whitened, scale * plain)
    assert abs(scale - 1) > 0.05, "a scale of 1 would show nothing"
    unscaled = gradient(learnt.advantages, ppo.spec(config, 1.0, STATE))
    assert (unscaled - whitened).norm() > 1e-2 * whitened.norm()


def test_exact_rewards_carry_the_discounted_kl_of_the_next_state():
    from fastrlhf.algorithms import token_rewards

    scores = draw(B, seed=8)
    rewards = token_rewards(scores, experience(), CONFIG, STATE)
    kl = experience().kl
    assert rewards[0, 1] == pytest.approx(float(-0.9 * 0.3 * kl[0, 2]))
    assert rewards[1, 2] == pytest.approx(float(scores[1])), "no KL after the last token"
    assert (rewards[~MASK] == 0).all()


def test_the_kl_stands_in_reward_or_loss_but_not_in_both():
    ppo = ALGORITHMS["ppo"]
    assert ppo.spec(CONFIG, 2.0, STATE).kl_coef == pytest.approx(0.6)
    assert ppo.spec(replace(CONFIG, kl_estimator="k1"), 2.0, STATE).kl_coef == 0
    spec = ppo.spec(replace(CONFIG, kl_estimator="k3"), 1.0, STATE)
    assert (spec.kl_estimator, spec.kl_coef, spec.cliprange_low) == ("k3", 0.3, 0.3)


def test_without_a_kl_the_reward_is_the_score():
    from fastrlhf.algorithms import token_rewards

    scores = draw(B, seed=8)
    config = replace(CONFIG, kl_coef=0.0)
    state = AlgorithmState.of(config)
    rewards = token_rewards(scores, replace(experience(), kl=None), config, state)
    torch.testing.assert_close(rewards.sum(-1), scores, check_dtype=False)
    assert rewards[0, 4] != 0 and (rewards[0, :4] == 0).all()


def test_explained_variance():
    returns = draw(B, T)
    assert explained_variance(returns, returns, MASK) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(B, T), returns, MASK) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(B, T), MASK) == 0.0
