"""The high level: its gradient against float64 autograd, whose credit is whose, what it keeps."""

import json

import pytest
import torch

from fastrlhf import HierarchicalConfig, UserError
from fastrlhf.mode_policy import ModeLearner, ModePolicy

NAMES = ["a", "b", "c"]
SIZE = 8


def made(seed=0, names=NAMES, **changes):
    """A policy with weights that are not 0, its learner, and features of some prompts."""
    generator = torch.Generator().manual_seed(seed)
    policy = ModePolicy(len(names), SIZE)
    for p in policy.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    states = torch.randn(40, SIZE, generator=generator) * 3 + 5
    policy.standardize(states)
    config = HierarchicalConfig(modes={name: name for name in names}, **changes)
    return policy, ModeLearner(policy, names, config), states, generator


def test_the_gradient_is_that_of_the_formula_in_float64(relative_rms):
    policy, learner, states, generator = made(mode_entropy_coef=0.3, cliprange=0.1)
    modes = torch.randint(3, (40,), generator=generator)
    advantages = torch.randn(40, generator=generator)
    targets = torch.randn(40, generator=generator)
    features = policy.features(states).detach()
    old = policy.logprobs(features)[torch.arange(40), modes].detach()
    old += 0.3 * torch.randn(40, generator=generator)
    learner.loss(features, modes, old, advantages, targets).backward()

    weight = policy.policy.detach().double().requires_grad_()
    value = policy.value.detach().double().requires_grad_()
    mean, deviation = states.double().mean(0), states.double().std(0, correction=0)
    x = torch.cat([(states - mean) / deviation / SIZE**0.5, torch.ones(40, 1)], 1)
    chances = (x.double() @ weight.T).softmax(-1)
    ratio = chances[torch.arange(40), modes] / old.double().exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
    entropy = -(chances * chances.log()).sum(-1)
    error = (x.double() @ value - targets) ** 2 / 2
    (-surrogate - 0.3 * entropy + error).mean().backward()
    assert ratio.min() < 0.9 and ratio.max() > 1.1
    assert relative_rms(policy.policy.grad, weight.grad) < 1e-5
    assert relative_rms(policy.value.grad, value.grad) < 1e-5


def test_modes_are_drawn_as_often_as_the_policy_says():
    policy, _, states, generator = made()
    one = states[:1].expand(20_000, -1)
    shares = policy.draw(one, generator).bincount(minlength=3) / 20_000
    expected = policy.logprobs(policy.features(states[:1])).exp()[0]
    assert torch.allclose(shares, expected.detach(), atol=0.015)


def test_credit_goes_to_the_mode_and_not_to_the_prompt():
    """Prompts of kind 1 score 10 more in any mode; what a mode adds is 1, where it fits."""
    policy, learner, _, generator = made(names=["a", "b"])
    for p in policy.parameters():
        p.data.zero_()
    kinds = torch.arange(64) % 2
    states = torch.randn(64, SIZE, generator=generator) * 0.2 + 2.0 * kinds[:, None]
    policy.standardize(states)
    for _ in range(60):
        modes = policy.draw(states, generator)
        line = learner.update(states, modes, 10.0 * kinds + (modes == kinds))
    chances = policy.logprobs(policy.features(states)).exp()
    assert chances[torch.arange(64), kinds].min() > 0.9
    # A moving average would leave the 5 of the kinds in the advantages.
    assert line["mode/advantage_std"] < 1.0 and line["mode/explained_variance"] > 0.9


def test_equal_scores_move_nothing_and_unjudged_ones_are_not_seen():
    policy, learner, states, generator = made(mode_entropy_coef=0.0)
    policy.value.data.zero_()
    before = policy.policy.detach().clone()
    line = learner.update(states, torch.zeros(40, dtype=torch.long), torch.full((40,), 2.0))
    assert torch.equal(policy.policy, before)
    assert line["mode/share/a"] == 1.0 and line["mode/score/a"] == 2.0
    assert line["mode/share/b"] == 0.0 and "mode/score/b" not in line
    assert (
        learner.update(states, torch.zeros(40, dtype=torch.long), torch.full((40,), torch.nan))
        == {}
    )
    assert torch.equal(policy.policy, before)

    scores, modes = torch.randn(40, generator=generator), torch.arange(40) % 3
    twins = [made() for _ in range(2)]
    half = torch.arange(40) < 20
    twins[0][1].update(states[:20], modes[:20], scores[:20])
    twins[1][1].update(states, modes, scores.masked_fill(~half, torch.nan))
    assert torch.equal(twins[0][0].policy, twins[1][0].policy)


def test_the_unit_of_the_score_does_not_matter():
    modes = torch.arange(40) % 3
    scores = torch.randn(40, generator=torch.Generator().manual_seed(5))
    weights = []
    for unit in (1.0, 256.0):
        policy, learner, states, _ = made()
        for _ in range(3):
            learner.update(states, modes, unit * scores - 3 * unit)
        weights.append(policy.policy.detach())
    assert torch.allclose(*weights, atol=1e-4)


def test_a_constant_state_says_nothing():
    policy = ModePolicy(2, 4)
    states = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    states[:, 2] = 7.0
    policy.standardize(states)
    features = policy.features(states)
    assert features.isfinite().all() and features[:, 2].abs().max() < 1e-2


def test_what_it_keeps_goes_on_to_the_same_bits():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(5))
    modes = torch.arange(40) % 3
    policy, learner, states, _ = made()
    learner.update(states, modes, scores)
    kept = json.loads(json.dumps(learner.state_dict()))
    other, resumed, _, _ = made(seed=9)
    other.load_state_dict(policy.state_dict())
    resumed.load_state_dict(kept)
    lines = [x.update(states, modes, scores + 1) for x in (learner, resumed)]
    assert lines[0] == lines[1]
    assert torch.equal(policy.policy, other.policy) and torch.equal(policy.value, other.value)


def test_other_modes_are_refused():
    _, learner, _, _ = made()
    _, other, _, _ = made(names=["a", "c", "b"])
    with pytest.raises(UserError, match="modes are a, b, c, not a, c, b"):
        other.load_state_dict(learner.state_dict())
