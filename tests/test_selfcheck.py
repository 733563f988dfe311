"""Each identity holds within the rounding of what it compares, and is refused beyond it."""

from dataclasses import replace

import pytest
import torch
from test_trainer_algorithms import train

import fastrlhf.trainer as module
from fastrlhf import GRPOConfig, SelfCheckError
from fastrlhf.selfcheck import ROLLOUT_SLACK, check_first_minibatch
from fastrlhf_kernels import PolicyLossSpec, policy_loss


def stats(gaps):
    """Of tokens whose log-probabilities lie so far from the old ones."""
    old = torch.full_like(gaps, -2.0)
    mask = torch.ones_like(gaps, dtype=torch.bool)
    return policy_loss(old + gaps, old, torch.ones_like(gaps), mask, PolicyLossSpec()).stats


def rounding(size):
    """Log-ratios up to ``size``, most of them less."""
    return size * (2 * torch.rand(4096, generator=torch.Generator().manual_seed(0)) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sampled_old_logprobs_may_be_of_samplings_rounding(dtype):
    for gaps in (rounding(ROLLOUT_SLACK[dtype]), torch.full((64,), 0.99 * ROLLOUT_SLACK[dtype])):
        check_first_minibatch(stats(gaps), dtype, "sampled")
        with pytest.raises(SelfCheckError, match="scoring and update compute different things"):
            check_first_minibatch(stats(gaps), dtype)
    for beyond in (rounding(4 * ROLLOUT_SLACK[dtype]), torch.full((64,), torch.nan)):
        with pytest.raises(SelfCheckError, match="old_logprobs: sampled allows"):
            check_first_minibatch(stats(beyond), dtype, "sampled")


def test_scored_ones_may_not():
    check_first_minibatch(stats(torch.zeros(8)), torch.float32)
    with pytest.raises(SelfCheckError, match="instead of 1, 0, 0"):
        check_first_minibatch(stats(rounding(1e-2)), torch.float32)


def test_a_run_on_sampled_ones_bears_samplings_rounding(tmp_path, monkeypatch):
    original = module.score

    def rounded(*given):
        experience = original(*given)
        gaps = rounding(5e-3)[: experience.old_logprobs.numel()]
        off = experience.old_logprobs + gaps.view_as(experience.old_logprobs)
        return replace(experience, old_logprobs=off)

    monkeypatch.setattr(module, "score", rounded)
    settings = {"kind": GRPOConfig, "rollouts": 1, "num_generations": 4}
    _, _, (line,) = train(tmp_path / "sampled", old_logprobs="sampled", **settings)
    assert 0 < line["check/first_approx_kl"] < 5e-5
    with pytest.raises(SelfCheckError, match="instead of 1, 0, 0"):
        train(tmp_path / "scored", **settings)
