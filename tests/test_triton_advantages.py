"""Triton's advantages and whitening: the reference's numbers, and identities."""

import pytest
import torch

import fastrlhf_kernels as ops
from fastrlhf_kernels import reference

pytest.importorskip("triton")

from fastrlhf_kernels import _triton_advantages
from fastrlhf_kernels._triton_advantages import gae, whiten

pytestmark = pytest.mark.interpret


@pytest.fixture
def rollout(device, monkeypatch):
    monkeypatch.setattr(_triton_advantages, "BLOCK_SEQUENCES", 4)
    monkeypatch.setattr(_triton_advantages, "WHITEN_BLOCK", 16)
    monkeypatch.setattr(_triton_advantages, "PARTS", 2)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 11, generator=generator).to(device)
    mask = (torch.rand(6, 11, generator=generator) < 0.7).to(device)
    mask[0], mask[1] = True, False
    for x in (rewards, values):
        x[~mask] = torch.nan
    return rewards, values, mask


def test_gae_is_the_reference_s(rollout):
    rewards, values, mask = rollout
    got = gae(rewards, values, mask, 0.9, 0.8)
    expected = reference.gae(rewards, values, mask, 0.9, 0.8)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        assert x[~mask].eq(0).all()
    assert not torch.allclose(gae(rewards, values, mask, 0.9, 0.81)[0], expected[0], rtol=1e-3)
    turned = [x.T.contiguous().T for x in rollout]
    assert torch.equal(gae(*turned, 0.9, 0.8)[0], got[0])
    alone = gae(*[x[3:4] for x in rollout], 0.9, 0.8)
    assert torch.equal(alone[0], got[0][3:4])


def test_the_ops_take_the_backend(rollout):
    rewards, values, mask = rollout
    for op, given, options in (
        (ops.gae, (rewards.bfloat16(), values, mask), {"gamma": 0.9, "lam": 0.8}),
        (ops.whiten, (values, mask), {"center": False}),
    ):
        got, expected = (op(*given, backend=x, **options) for x in ("triton", "reference"))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    leaf = torch.where(mask, values, 0).requires_grad_()
    assert ops.whiten(leaf, mask).requires_grad  # by the reference, which autograd sees
    with pytest.raises(ValueError, match="does not support a gradient"):
        ops.whiten(leaf, mask, backend="triton")


def test_gae_identities(rollout):
    rewards, values, mask = rollout
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    later = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, later, 0), rtol=0, atol=3e-6)
    residual = torch.where(mask, returns - values, 0)
    torch.testing.assert_close(advantages, residual, rtol=0, atol=3e-6)
    assert not torch.allclose(gae(rewards, values, mask, 1.0, 0.9)[1], returns, atol=1e-3)
    row = mask[0]
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    following = torch.nn.functional.pad(values[0, 1:], (0, 1))
    delta = rewards[0] + 0.9 * following - values[0]
    torch.testing.assert_close(advantages[0][row], delta, rtol=0, atol=1e-6)


def test_whiten_identities(rollout, device):
    x, _, mask = rollout
    x = 3 * x + 5
    got = whiten(x, mask, True)
    kept = got[mask].double()
    assert kept.mean().abs() < 1e-6 and (kept.var() - 1).abs() < 1e-5
    assert got[~mask].eq(0).all()
    assert torch.equal(whiten(x, mask, True), got)
    truth = reference.whiten(x.double(), mask, True)
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-6)
    shifted = whiten(x, mask, False)
    torch.testing.assert_close(shifted[mask].mean(), x[mask].mean())
    assert not torch.allclose(shifted, got, atol=1e-3)
    # The variance of one entry is 0, and of none is nothing.
    one = torch.zeros_like(mask)
    assert whiten(x, one, True).eq(0).all()
    one[0, 3] = True
    assert whiten(x, one, True).eq(0).all() and whiten(x, one, False).sum() == x[0, 3]
    # A mean far from 0 takes nothing from the deviation: 1000 moments of blocks, not of squares.
    far = torch.linspace(0, 1, 66, device=device).reshape(6, 11) + 1000
    everything = torch.ones_like(mask)
    truth = reference.whiten(far.double(), everything, True)
    eager = (reference.whiten(far, everything, True) - truth).norm()
    assert (whiten(far, everything, True) - truth).norm() <= eager + 1e-6
    assert whiten(x[:0], mask[:0], True).shape == (0, 11)


def test_variants_name_every_argument():
    listed = list(_triton_advantages.variants("sm_80"))
    assert [x.name for x in listed] == ["gae", "moments", "whiten"]
    for x in listed:
        assert list(x.signature) == list(x.kernel.arg_names)
