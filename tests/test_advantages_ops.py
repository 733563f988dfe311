"""GAE and whitening as identities."""

import pytest
import torch

from fastrlhf_kernels import gae, whiten


@pytest.fixture
def rollout():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 5, 1, 0])[:, None]
    return rewards, values, mask


def discounted_returns(rewards, mask, gamma):
    total, out = torch.zeros(rewards.shape[0], dtype=rewards.dtype), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        total = torch.where(mask[:, t], rewards[:, t] + gamma * total, total)
        out[:, t] = torch.where(mask[:, t], total, 0)
    return out


def test_lambda_1_gives_returns_minus_values(rollout):
    rewards, values, mask = rollout
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    expected = discounted_returns(rewards, mask, 0.9)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, torch.where(mask, expected - values, 0))


def test_lambda_0_gives_the_td_residual(rollout):
    rewards, values, mask = rollout
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    next_values = torch.nn.functional.pad(torch.where(mask, values, 0)[:, 1:], (0, 1))
    residual = rewards + 0.9 * next_values - values
    torch.testing.assert_close(advantages, torch.where(mask, residual, 0))


def test_masked_tokens_inside_a_sequence_are_skipped(rollout):
    rewards, values, mask = rollout
    dense = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    # The same tokens with a hole after the second, filled with NaN that must never be read.
    place = torch.tensor([0, 1, 3, 4, 5, 7, 8])
    wide = [torch.full((4, 9), torch.nan, dtype=torch.float64) for _ in range(2)]
    wide_mask = torch.zeros(4, 9, dtype=torch.bool)
    for hole, full in zip((*wide, wide_mask), (rewards, values, mask), strict=True):
        hole[:, place] = full
    sparse = gae(*wide, wide_mask, gamma=0.9, lam=0.8)
    for got, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(got[:, place], expected)
        assert got[~wide_mask].eq(0).all()


def test_gae_carries_no_gradient_and_keeps_float32(rollout):
    rewards, values, mask = rollout
    values = values.float().requires_grad_()
    advantages, returns = gae(rewards.float(), values, mask, gamma=1, lam=1)
    assert not advantages.requires_grad and not returns.requires_grad
    assert advantages.dtype == returns.dtype == torch.float32


def test_whitening_moments(rollout):
    x, _, mask = rollout
    x = x.masked_fill(~mask, torch.nan)
    whitened = whiten(x, mask)
    assert whitened[mask].mean().abs() < 1e-12
    assert (whitened[mask].var() - 1).abs() < 1e-6
    assert whitened[~mask].eq(0).all()
    kept = whiten(x, mask, center=False)
    torch.testing.assert_close(kept[mask].mean(), x[mask].mean())
    assert (kept[mask].var() - 1).abs() < 1e-6
    assert kept[~mask].eq(0).all()


def test_whitening_of_one_entry_and_of_none_is_finite():
    x, mask = torch.tensor([3.0, torch.nan]), torch.tensor([True, False])
    assert whiten(x, mask).tolist() == [0.0, 0.0]
    assert whiten(x, mask, center=False).tolist() == [3.0, 0.0]
    assert whiten(x, torch.zeros(2, dtype=torch.bool)).tolist() == [0.0, 0.0]


def test_bad_input_raises_with_the_shapes(rollout):
    rewards, values, mask = rollout
    with pytest.raises(ValueError, match=r"\[4, 6\]"):
        gae(rewards, values[:, 1:], mask, gamma=1, lam=1)
    with pytest.raises(ValueError, match=r"\[7\]"):
        gae(rewards[0], values[0], mask[0], gamma=1, lam=1)
    with pytest.raises(ValueError, match="gamma"):
        gae(rewards, values, mask, gamma=1.1, lam=1)
    with pytest.raises(ValueError, match="bool"):
        whiten(rewards, mask.long())
    with pytest.raises(RuntimeError, match="no 'cpu' backend"):
        whiten(rewards, mask, backend="cpu")
