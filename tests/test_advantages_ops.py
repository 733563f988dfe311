"""GAE and whitening as identities."""

import pytest
import torch

from fastrlhf_kernels import _cpu, gae, whiten

needs_csrc = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_csrc)])
def backend(request):
    return request.param


@pytest.fixture
def rollout(backend):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    if backend == "cpu":
        rewards, values = rewards.float(), values.float()
    mask = torch.arange(7) < torch.tensor([7, 5, 1, 0])[:, None]
    return rewards, values, mask


def discounted_returns(rewards, mask, gamma):
    total, out = torch.zeros(rewards.shape[0], dtype=rewards.dtype), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        total = torch.where(mask[:, t], rewards[:, t] + gamma * total, total)
        out[:, t] = torch.where(mask[:, t], total, 0)
    return out


def test_lambda_1_gives_returns_minus_values(rollout, backend):
    rewards, values, mask = rollout
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0, backend=backend)
    expected = discounted_returns(rewards, mask, 0.9)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, torch.where(mask, expected - values, 0))


def test_lambda_0_gives_the_td_residual(rollout, backend):
    rewards, values, mask = rollout
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0, backend=backend)
    next_values = torch.nn.functional.pad(torch.where(mask, values, 0)[:, 1:], (0, 1))
    residual = rewards + 0.9 * next_values - values
    torch.testing.assert_close(advantages, torch.where(mask, residual, 0))


def test_masked_tokens_inside_a_sequence_are_skipped(rollout, backend):
    rewards, values, mask = rollout
    dense = gae(rewards, values, mask, gamma=0.9, lam=0.8, backend=backend)
    # The same tokens with a hole after the second, filled with NaN that must never be read.
    place = torch.tensor([0, 1, 3, 4, 5, 7, 8])
    wide = [torch.full((4, 9), torch.nan, dtype=rewards.dtype) for _ in range(2)]
    wide_mask = torch.zeros(4, 9, dtype=torch.bool)
    for hole, full in zip((*wide, wide_mask), (rewards, values, mask), strict=True):
        hole[:, place] = full
    sparse = gae(*wide, wide_mask, gamma=0.9, lam=0.8, backend=backend)
    for got, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(got[:, place], expected)
        assert got[~wide_mask].eq(0).all()


def test_gae_carries_no_gradient_and_keeps_float32(rollout, backend):
    rewards, values, mask = rollout
    values = values.float().requires_grad_()
    advantages, returns = gae(rewards.float(), values, mask, gamma=1, lam=1, backend=backend)
    assert not advantages.requires_grad and not returns.requires_grad
    assert advantages.dtype == returns.dtype == torch.float32


def test_whitening_moments(rollout, backend):
    x, _, mask = rollout
    x = x.masked_fill(~mask, torch.nan)
    whitened = whiten(x, mask, backend=backend)
    assert whitened[mask].mean().abs() < 8 * torch.finfo(x.dtype).eps
    assert (whitened[mask].var() - 1).abs() < 1e-6
    assert whitened[~mask].eq(0).all()
    kept = whiten(x, mask, center=False, backend=backend)
    torch.testing.assert_close(kept[mask].mean(), x[mask].mean())
    assert (kept[mask].var() - 1).abs() < 1e-6
    assert kept[~mask].eq(0).all()


def test_whitening_of_one_entry_and_of_none_is_finite(backend):
    x, mask = torch.tensor([3.0, torch.nan]), torch.tensor([True, False])
    assert whiten(x, mask, backend=backend).tolist() == [0.0, 0.0]
    assert whiten(x, mask, center=False, backend=backend).tolist() == [3.0, 0.0]
    assert whiten(x, torch.zeros(2, dtype=torch.bool), backend=backend).tolist() == [0.0, 0.0]


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


@needs_csrc
def test_the_cpu_backend_takes_no_float64_and_no_gradient():
    x, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="float64"):
        gae(x.double(), x.double(), mask, gamma=1, lam=1, backend="cpu")
    with pytest.raises(ValueError, match="gradient"):
        whiten(x.requires_grad_(), mask, backend="cpu")
    assert whiten(x, mask).requires_grad


@needs_csrc
# 300 × 257 is enough for two threads and ends in a ragged chunk; then one row, and one column.
@pytest.mark.parametrize("shape", [(300, 257), (1, 9001), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_backends_agree_and_threads_change_no_bit(shape, dtype, relative_rms):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, *shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.8
    rewards, values = (x.masked_fill(~mask, torch.nan) for x in (rewards, values))
    # Another layout than that of the mask.
    values = values.T.contiguous().T

    def run(backend, as_dtype=dtype):
        given = [x.to(as_dtype) for x in (rewards, values)]
        out = gae(*given, mask, gamma=0.99, lam=0.95, backend=backend)
        return *out, *(whiten(given[0], mask, center=c, backend=backend) for c in (True, False))

    truth, eager, ours = run("reference", torch.float64), run("reference"), run("cpu")
    for got, other, exact in zip(ours, eager, truth, strict=True):
        assert got.dtype == torch.float32 and got[~mask].eq(0).all()
        assert relative_rms(got, exact) <= relative_rms(other, exact) + 1e-7
        assert relative_rms(got.flip(-1), exact) > 1e-3 or shape[1] == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert all(torch.equal(x, y) for x, y in zip(ours, run("cpu"), strict=True))
    finally:
        torch.set_num_threads(threads)
