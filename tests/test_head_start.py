"""The head's start: the linear reward of the data is found, and held back where there is little."""

import torch

from fastrlhf.comparisons import PairedTexts, RatedTexts
from fastrlhf.rewards.head_start import fit_head, solve


def problem(n=300, d=8, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n, d, generator=generator) * torch.linspace(0.1, 3, d) + 2
    truth = torch.randn(d, generator=generator)
    ratings = states @ truth + noise * torch.randn(n, generator=generator)
    tokens = [[i] for i in range(n)]
    return states, ratings, RatedTexts(tokens, ratings, torch.zeros(n, dtype=torch.long))


def test_a_linear_reward_is_found():
    states, ratings, rated = problem()
    scores = states @ fit_head(states, rated, seed=0)
    assert torch.corrcoef(torch.stack([scores, ratings]))[0, 1] > 0.99


def test_the_gradient_at_the_solution_is_zero():
    states, ratings, _ = problem(40)
    order = ratings.argsort()
    pairs = PairedTexts([[i] for i in range(40)], order[20:], order[:20], torch.zeros(20))
    weights = solve(states, pairs, 0.1, seed=0)
    std = states.std(0)
    scaled = ((states - states.mean(0)) / std).double()
    own = (weights * std).double().requires_grad_()
    scores = scaled @ own
    loss = -torch.nn.functional.logsigmoid(scores[order[20:]] - scores[order[:20]]).mean()
    (loss + 0.05 * own.square().sum()).backward()
    assert own.grad is not None and float(own.grad.norm()) < 1e-3


def test_two_pairs_are_enough_to_start_from():
    states = torch.eye(4)
    pairs = PairedTexts(
        [[i] for i in range(4)], torch.tensor([0, 0]), torch.tensor([1, 1]), torch.zeros(2)
    )
    scores = states @ fit_head(states, pairs, seed=0)
    assert scores[0] > scores[1]
