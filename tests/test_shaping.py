"""The reward's shape: which token carries what, and that its gradient is that of the objective."""

import itertools

import pytest
import torch

from fastrlhf.rewards.shaping import (
    ObjectiveShaper,
    RunningMoments,
    eos_penalty,
    kl_reward,
    log_scaled,
    next_valid,
    place_scores,
    weighted_sum,
)
from fastrlhf_kernels import PolicyLossSpec, gae, linear_policy_loss

VOCAB, LENGTH, BETA = 3, 2, 0.37


def test_scores_land_on_the_last_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    rewards = place_scores(torch.zeros(3, 3), torch.tensor([2.0, 3.0, 4.0]), mask)
    assert rewards.tolist() == [[0, 2, 0], [0, 0, 3], [0, 0, 0]]


def test_next_valid_skips_masked_tokens():
    x = torch.tensor([[1.0, 2, 3, 4]])
    assert next_valid(x, torch.tensor([[True, True, True, True]])).tolist() == [[2, 3, 4, 0]]
    assert next_valid(x, torch.tensor([[True, False, True, False]])).tolist() == [[3, 0, 0, 0]]


def test_k1_is_the_tokens_own_log_ratio():
    mask = torch.tensor([[True, False]])
    reward = kl_reward(
        "k1", 0.5, 1.0, kl=torch.zeros(1, 2), mask=mask,
        old_logprobs=torch.tensor([[-1.0, -1.0]]), ref_logprobs=torch.tensor([[-3.0, -3.0]]),
    )  # fmt: skip
    assert reward.tolist() == [[-1.0, 0.0]]


def test_eos_penalty():
    scores = eos_penalty(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.25)
    assert scores.tolist() == [1.0, 0.75]


def test_running_moments_are_those_of_all_scores_at_once():
    scores = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1.0, 100.0, 1e-3]) + 1e4
    scores[::7, 1] = torch.nan
    moments = RunningMoments(3)
    for part in scores.split([1, 30, 0, 19]):
        moments.update(part)
    for k in range(3):
        own = scores[:, k][~scores[:, k].isnan()]
        assert moments.count[k] == len(own)
        torch.testing.assert_close(moments.mean[k], own.mean())
        torch.testing.assert_close(moments.std[k], own.std())


def test_one_score_is_not_divided_by_zero():
    shaper = ObjectiveShaper(normalization="running")
    assert shaper(torch.tensor([[3.0], [3.0]]), [1.0]).tolist() == [0.0, 0.0]


def test_objectives_are_scaled_by_themselves_and_then_weighted():
    scores = torch.tensor([[100.0, 0.1], [300.0, 0.3], [200.0, 0.2]])
    shaper = ObjectiveShaper(normalization="running")
    # Both have the same standard scores: -1, 1, 0.
    torch.testing.assert_close(shaper(scores, [1.0, -1.0]), torch.zeros(3), atol=1e-4, rtol=0)
    shaper = ObjectiveShaper(normalization="running", clip=0.5)
    found = shaper(scores, [1.0, 3.0])
    torch.testing.assert_close(found, torch.tensor([-2.0, 2.0, 0.0]), atol=1e-4, rtol=0)


def test_log_scaling_keeps_signs_and_zero():
    x = torch.tensor([-(torch.e - 1), 0.0, torch.e - 1])
    torch.testing.assert_close(log_scaled(x), torch.tensor([-1.0, 0.0, 1.0]))
    shaper = ObjectiveShaper(scaling="log", clip=0.5)
    assert shaper(x[:, None], [2.0]).tolist() == [-1.0, 0.0, 1.0]


def test_a_weighted_sum_passes_over_what_is_not_judged():
    nan = torch.nan
    found = weighted_sum(torch.tensor([[1.0, 2.0], [nan, 2.0], [nan, nan]]), [1.0, 0.5])
    assert found[:2].tolist() == [2.0, 1.0] and found[2].isnan()


class Enumerated:
    """An MDP of two steps over three tokens, small enough to sum over all trajectories."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCAB), repeat=n)]
        self.state = {prefix: i for i, prefix in enumerate(prefixes)}

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.logits = draw(len(prefixes), VOCAB).requires_grad_()
        self.ref_logits = draw(len(prefixes), VOCAB)
        self.trajectories = list(itertools.product(range(VOCAB), repeat=LENGTH))
        self.scores = dict(zip(self.trajectories, draw(len(self.trajectories)), strict=True))

    def states(self, trajectory):
        return torch.tensor([self.state[trajectory[:t]] for t in range(LENGTH)])

    def kl(self):
        ours, theirs = self.logits.log_softmax(-1), self.ref_logits.log_softmax(-1)
        return (ours.exp() * (ours - theirs)).sum(-1)

    def probability(self, trajectory):
        states, actions = self.states(trajectory), torch.tensor(trajectory)
        return self.logits.log_softmax(-1)[states, actions].sum().exp()

    def objective(self):
        """J: the expected score minus BETA times the KL of the states that are visited."""
        kl = self.kl()
        return sum(
            self.probability(t) * (self.scores[t] - BETA * kl[self.states(t)].sum())
            for t in self.trajectories
        )

    def estimate(self, kl_of_reward, kl_coef_in_loss) -> torch.Tensor:
        """The expected gradient of our loss: every trajectory's, weighted by its probability."""
        kl = self.kl().detach()
        total = torch.zeros_like(self.logits)
        mask = torch.ones(1, LENGTH, dtype=torch.bool)
        for trajectory in self.trajectories:
            states, actions = self.states(trajectory), torch.tensor(trajectory)
            logprobs = self.logits.detach().log_softmax(-1)[states, actions]
            ref_logprobs = self.ref_logits.log_softmax(-1)[states, actions]
            shaped = kl_of_reward(kl[states][None], logprobs[None], ref_logprobs[None], mask)
            rewards = place_scores(shaped, self.scores[trajectory][None], mask)
            zeros = torch.zeros_like(rewards)
            advantages, _ = gae(rewards, zeros, mask, gamma=1.0, lam=1.0)
            # Hidden states are unit vectors, so that the head's rows are the states' logits.
            rows = self.logits.detach().requires_grad_()
            loss = linear_policy_loss(
                rows[states], torch.eye(VOCAB, dtype=torch.float64), actions, logprobs,
                advantages[0], mask[0], PolicyLossSpec(kl_coef=kl_coef_in_loss),
                ref_hidden=self.ref_logits[states], ref_weight=torch.eye(VOCAB).double(),
                num_items=1,
            ).loss  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, rows)
            total -= self.probability(trajectory).detach() * gradient
        return total


def relative_error(estimate, truth):
    return float((estimate - truth).norm() / truth.norm())


def shaped_by(estimator):
    def shape(kl, logprobs, ref_logprobs, mask):
        return kl_reward(
            estimator, BETA, 1.0, kl=kl, old_logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask
        )

    return shape


@pytest.mark.parametrize(
    ("estimator", "kl_coef_in_loss"), [("exact", BETA), ("k1", 0.0)], ids=["exact", "k1"]
)
def test_gradient_is_that_of_the_objective(estimator, kl_coef_in_loss):
    mdp = Enumerated()
    (truth,) = torch.autograd.grad(mdp.objective(), mdp.logits)
    estimate = mdp.estimate(shaped_by(estimator), kl_coef_in_loss)
    assert relative_error(estimate, truth) < 1e-12


def test_the_states_own_kl_as_its_reward_would_be_seen():
    mdp = Enumerated()
    (truth,) = torch.autograd.grad(mdp.objective(), mdp.logits)
    wrong = mdp.estimate(lambda kl, logprobs, ref_logprobs, mask: -BETA * kl, 0.0)
    half = mdp.estimate(shaped_by("exact"), 0.0)
    assert relative_error(wrong, truth) > 0.1
    assert relative_error(half, truth) > 0.1
