"""Every row's gradient on a hand-made batch, against its paper's formula written down here."""

from dataclasses import replace

import pytest
import tabular
import torch
from tabular import (
    EVERY,
    MASK,
    ON_POLICY,
    REAL,
    SCENE,
    SCORES,
    B,
    G,
    T,
    backbone,
    constant,
    microbatch,
    ours,
    papers,
    sequence_mean,
    token_mean,
)  # fmt: skip

from fastrlhf.algorithms import ALGORITHMS
from fastrlhf.config import PPOConfig
from fastrlhf.configs import A2CConfig, GRPOConfig, ReinforceConfig, RLOOConfig
from fastrlhf.controllers import AlgorithmState
from fastrlhf.losses import microbatch_loss, policy_items


def equal(got, expected):
    assert expected.abs().max() > 1e-3, "a gradient of 0 would show nothing"
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def at_the_end(scores):
    """Scores as rewards: at each sequence's last token."""
    rewards = torch.zeros(B, T, dtype=torch.float64)
    rewards[torch.arange(B), MASK.sum(1) - 1] = scores
    return rewards


def returns_of(rewards, gamma):
    """Discounted sums of what follows, one sequence and token at a time."""
    result = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        for t in range(int(MASK[b].sum())):
            result[b, t] = sum(gamma ** (s - t) * rewards[b, s] for s in range(t, T) if MASK[b, s])
    return result


def gae_of(rewards, values, gamma, lam):
    result = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        n = int(MASK[b].sum())
        following = [*values[b, 1:n].tolist(), 0.0]
        deltas = [
            float(rewards[b, t]) + gamma * following[t] - float(values[b, t]) for t in range(n)
        ]
        for t in range(n):
            result[b, t] = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n))
    return result


def whitened(x):
    return (x - x[MASK].mean()) / x[MASK].std(), 1 / x[MASK].std()


def group_normalised(scores, divide=True):
    groups = scores.view(-1, G)
    gap = groups - groups.mean(1, keepdim=True)
    if divide:
        gap = gap / (groups.std(1, keepdim=True) + 1e-4)
    return gap.reshape(-1, 1)


def leave_one_out(returns):
    groups = returns.view(-1, G)
    others = [[groups[g, [j for j in range(G) if j != i]].mean() for i in range(G)] for g in (0, 1)]
    return (groups - torch.tensor(others, dtype=torch.float64)).reshape(-1, 1)


def clipped_objective(ratio, advantage, low, high):
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


@pytest.mark.parametrize("baseline", ["none", "constant", "batch_mean", "moving_average"])
def test_reinforce(baseline):
    config = ReinforceConfig(
        batch_size=6, total_episodes=6, baseline=baseline, baseline_constant=0.3, kl_coef=0.2,
        kl_estimator="k1", gamma=0.9, entropy_coef=0.05,
    )  # fmt: skip
    state = AlgorithmState.of(config)
    state.returns.update(0.8)
    kl = SCENE.logprobs(SCENE.old) - SCENE.logprobs(SCENE.reference)
    returns = returns_of(at_the_end(SCORES) - 0.2 * kl * MASK, 0.9)
    b = {"none": 0.0, "constant": 0.3, "batch_mean": returns[:, 0].mean(), "moving_average": 0.8}

    def loss(logits):
        score = -SCENE.logprobs(logits) * (returns - b[baseline])
        return constant(score - 0.05 * SCENE.entropy(logits))

    equal(ours(config, state=state), papers(loss))
    before = returns[:, 0].mean()
    assert state.returns.value == pytest.approx(float((0.9 * 0.8 + before) / 1.9))


def actor_critic(advantage, returns, average, scene=SCENE, clip_values=None):
    """REINFORCE's loss with an advantage, and the critic's squared error."""

    def loss(logits):
        error = (scene.values(logits) - returns).square()
        if clip_values is not None:
            near = scene.old_values + (scene.values(logits) - scene.old_values).clamp(
                -clip_values, clip_values
            )
            error = torch.maximum(error, (near - returns).square())
        policy = average(-scene.logprobs(logits) * advantage)
        return policy + 0.1 * token_mean(error / 2)

    return loss


def test_reinforce_with_values():
    config = ReinforceConfig(batch_size=6, total_episodes=6, baseline="value", kl_coef=0.0)
    returns = returns_of(at_the_end(SCORES), 1.0)
    loss = actor_critic(returns - SCENE.old_values, returns, constant)
    equal(ours(config), papers(loss))


@pytest.mark.parametrize("lam", [0.0, 0.7], ids=["td", "gae"])
def test_a2c(lam):
    config = A2CConfig(batch_size=6, total_episodes=6, lam=lam, gamma=0.9, kl_coef=0.0)
    if lam == 0:
        following = torch.zeros(B, T, dtype=torch.float64)
        following[:, :-1] = (SCENE.old_values * MASK)[:, 1:]
        advantage = at_the_end(SCORES) + 0.9 * following - SCENE.old_values
    else:
        advantage = gae_of(at_the_end(SCORES), SCENE.old_values, 0.9, lam)
    loss = actor_critic(advantage, (advantage + SCENE.old_values) * MASK, token_mean)
    equal(ours(config), papers(loss))


@pytest.mark.parametrize("dual_clip", [None, 1.2])
@pytest.mark.parametrize("cliprange_value", [None, 0.2])
def test_ppo(dual_clip, cliprange_value):
    """With the exact KL, its share of the loss scaled as the advantages are."""
    config = PPOConfig(
        batch_size=6, total_episodes=6, gamma=0.9, lam=0.7, kl_coef=0.2, dual_clip=dual_clip,
        cliprange=0.15, cliprange_high=0.25, cliprange_value=cliprange_value,
    )  # fmt: skip
    kl = SCENE.kl(SCENE.old)
    rewards = at_the_end(SCORES)
    rewards[:, :-1] -= 0.9 * 0.2 * (kl * MASK)[:, 1:]
    raw = gae_of(rewards, SCENE.old_values, 0.9, 0.7)
    advantage, scale = whitened(raw)
    targets = raw + SCENE.old_values
    critic = actor_critic(torch.zeros(B, T), targets, token_mean, clip_values=cliprange_value)

    def loss(logits):
        ratio = (SCENE.logprobs(logits) - SCENE.logprobs(SCENE.old)).exp()
        policy = clipped_objective(ratio, advantage, 0.15, 0.25)
        if dual_clip is not None:
            policy = torch.where(advantage < 0, policy.clamp(max=-dual_clip * advantage), policy)
        return token_mean(policy + 0.2 * scale * SCENE.kl(logits)) + critic(logits)

    equal(ours(config), papers(loss))


def test_ppo_kl():
    config = PPOConfig(
        algorithm="ppo_kl", batch_size=6, total_episodes=6, lam=0.7, kl_coef=0.0, old_kl_coef=0.5
    )
    raw = gae_of(at_the_end(SCORES), SCENE.old_values, 1.0, 0.7)
    advantage, _ = whitened(raw)
    critic = actor_critic(torch.zeros(B, T), raw + SCENE.old_values, token_mean, clip_values=0.2)

    def loss(logits):
        log_ratio = SCENE.logprobs(logits) - SCENE.logprobs(SCENE.old)
        policy = -log_ratio.exp() * advantage + 0.5 * (log_ratio.exp() - 1 - log_ratio)
        return token_mean(policy) + critic(logits)

    equal(ours(config), papers(loss))


def test_rloo():
    """On the policy that sampled, REINFORCE with the others' mean; the KL (k1) in the reward."""
    config = RLOOConfig(batch_size=6, total_episodes=6, num_generations=G, kl_coef=0.2)
    kl = ON_POLICY.logprobs(ON_POLICY.old) - ON_POLICY.logprobs(ON_POLICY.reference)
    advantage = leave_one_out(SCORES - 0.2 * (kl * MASK).sum(1))
    equal(
        ours(config, ON_POLICY),
        papers(lambda logits: constant(-ON_POLICY.logprobs(logits) * advantage), ON_POLICY),
    )


def test_rloo_off_policy():
    """Later minibatches: PPO's clip with the same advantages."""
    config = RLOOConfig(batch_size=6, total_episodes=6, num_generations=G, kl_coef=0.0)
    equal(ours(config), papers(ratio_loss(leave_one_out(SCORES), 0.2, 0.2, constant)))


def grpo_config(**changes):
    return GRPOConfig(
        batch_size=6, total_episodes=6, num_generations=G, overlong_share=0.0, **changes
    )


def ratio_loss(advantage, low, high, average):
    def loss(logits):
        ratio = (SCENE.logprobs(logits) - SCENE.logprobs(SCENE.old)).exp()
        return average(clipped_objective(ratio, advantage, low, high))

    return loss


def test_grpo():
    """Equation 3, with the KL's unbiased estimator (k3) in the loss."""
    surrogate = ratio_loss(group_normalised(SCORES), 0.2, 0.2, sequence_mean)

    def loss(logits):
        gap = SCENE.logprobs(SCENE.reference) - SCENE.logprobs(logits)
        return surrogate(logits) + 0.04 * sequence_mean(gap.exp() - gap - 1)

    equal(ours(grpo_config(kl_coef=0.04)), papers(loss))


def test_dr_grpo():
    loss = ratio_loss(group_normalised(SCORES, divide=False), 0.2, 0.2, constant)
    equal(ours(grpo_config(algorithm="dr_grpo")), papers(loss))


def test_dapo():
    loss = ratio_loss(group_normalised(SCORES), 0.2, 0.28, token_mean)
    equal(ours(grpo_config(algorithm="dapo")), papers(loss))


def test_gspo():
    """Equation 5: the ratio of a sequence is the geometric mean of its tokens'."""
    advantage = group_normalised(SCORES)

    def loss(logits):
        gap = (SCENE.logprobs(logits) - SCENE.logprobs(SCENE.old)) * MASK
        ratio = (gap.sum(1) / MASK.sum(1)).exp()[:, None]
        return clipped_objective(ratio, advantage, 0.05, 0.1).mean()

    equal(ours(grpo_config(algorithm="gspo", cliprange=0.05, cliprange_high=0.1)), papers(loss))


def test_cispo():
    advantage = group_normalised(SCORES)

    def loss(logits):
        logprobs = SCENE.logprobs(logits)
        weight = (logprobs - SCENE.logprobs(SCENE.old)).exp().detach().clamp(max=1.2)
        return token_mean(-weight * advantage * logprobs)

    equal(ours(grpo_config(algorithm="cispo", cliprange_high=0.2)), papers(loss))


def config_of(name):
    kind = {"reinforce": ReinforceConfig, "a2c": A2CConfig, "rloo": RLOOConfig}.get(name)
    if name.startswith("ppo"):
        return PPOConfig(algorithm=name, batch_size=6, total_episodes=6)
    if kind is None:
        return grpo_config(algorithm=name)
    generations = G if name == "rloo" else 1
    return kind(batch_size=6, total_episodes=6, num_generations=generations)


@pytest.mark.parametrize("sequences", [EVERY, REAL], ids=["every", "real"])
@pytest.mark.parametrize("way", ["sorted", "packed", "in_order"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_any_split_into_microbatches_is_the_minibatch(name, way, sequences):
    """Padded or packed; whether what trains nothing is a sampled token or padding."""
    config = config_of(name)
    whole = ours(config)
    for parts in ([(0, 1, 2), (3, 4, 5)], [(5,), (0, 3), (4, 1, 2)], [(i,) for i in range(B)]):
        cut = ours(config, parts=parts, way=way, sequences=sequences)
        torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_sequences_of_a_packed_row_are_told_apart(name, monkeypatch):
    """The test above would fail if all of a microbatch's tokens were one sequence's."""
    config = config_of(name)
    whole = ours(config)
    gather = tabular.gather

    def as_one(*given):
        batch = gather(*given)
        return replace(batch, sequence_ids=torch.zeros_like(batch.sequence_ids))

    monkeypatch.setattr(tabular, "gather", as_one)
    assert (ours(config, way="packed") - whole).norm() > 1e-2 * whole.norm()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_masked_trains_nothing(name):
    config = config_of(name)
    gradient = ours(config)
    assert (gradient[:, :-1][~MASK] == 0).all() and (gradient[:, -1] == 0).all()
    assert gradient[:, :-1][MASK].abs().max() > 1e-3
    beyond = SCENE.logits.clone()
    beyond[:, :-1][~MASK] = 1e4
    poisoned = replace(SCENE, logits=beyond, old_values=SCENE.old_values.where(MASK, torch.nan))
    torch.testing.assert_close(ours(config, poisoned), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo", "ppo_kl", "grpo", "dr_grpo", "dapo", "cispo", "rloo"])
def test_at_ratio_1_the_gradient_is_reinforces(name):
    """With the same advantages and average, whatever the ratio is used for."""
    config = replace(config_of(name), kl_coef=0.0, vf_coef=0.0)
    row = ALGORITHMS[name]
    state = AlgorithmState.of(config)
    learnt = row.advantages(SCORES, ON_POLICY.experience(config), config, state)
    average = {"token_mean": token_mean, "sequence_mean": sequence_mean, "constant": constant}
    expected = papers(
        lambda logits: average[row.aggregation](-ON_POLICY.logprobs(logits) * learnt.advantages)
    )
    equal(ours(config, ON_POLICY), expected)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_statistics_are_means_over_tokens(name):
    """Whatever the loss is divided by: on the policy that sampled the ratio is 1."""
    config = config_of(name)
    state = AlgorithmState.of(config)
    experience = ON_POLICY.experience(config)
    learnt = ALGORITHMS[name].advantages(SCORES, experience, config, state)
    spec = ALGORITHMS[name].spec(config, 1.0, state)
    experience = experience.with_advantages(learnt.advantages, learnt.returns)
    tokens, items = int(MASK.sum()), policy_items(spec, MASK, T)
    batch = microbatch(ON_POLICY, experience)
    loss = microbatch_loss(backbone(ON_POLICY), batch, spec, config, tokens, items)
    assert float(loss.policy.stats.ratio) == pytest.approx(1)
    assert float(loss.policy.stats.approx_kl) == pytest.approx(0, abs=1e-12)
    assert (loss.value is None) == (config.critic is None)
