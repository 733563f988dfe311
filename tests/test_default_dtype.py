"""Torch's default type and device are the caller's: no op on the CPU takes its memory from them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastrlhf_kernels import (
    AdamW8bit,
    PolicyLossSpec,
    _cpu,
    gae,
    linear_logprobs,
    linear_policy_loss,
    logprobs,
    policy_loss,
    sample,
    value_loss,
    whiten,
)

pytestmark = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")


def _head_ops(head, rollout) -> Iterator[Tensor]:
    targets, old_logprobs, advantages, mask = rollout
    leaves = [x.clone().requires_grad_() for x in head[:3]]
    hidden, weight, bias = leaves
    reference = {"ref_hidden": head[0] + 1, "ref_weight": head[1], "ref_bias": head[2]}
    out = linear_logprobs(
        hidden, weight, targets, bias=bias, stats=("mean_logits",), backend="cpu", **reference
    )
    yield from (out.logprobs, out.entropy, out.kl, out.extra["mean_logits"])
    yield from torch.autograd.grad((out.logprobs + out.entropy + out.kl).sum(), leaves)
    for loss in ("ppo_clip", "gspo"):
        spec = PolicyLossSpec(loss, kl_coef=0.1, entropy_coef=0.1, aggregation="sequence_mean")
        out = linear_policy_loss(
            hidden, weight, targets, old_logprobs, advantages, mask, spec, bias=bias,
            num_items=259, backend="cpu", **reference,
        )  # fmt: skip
        yield from (out.loss, *out.stats)
        yield from torch.autograd.grad(out.loss, leaves)


def _token_ops(logits, ref_logits, rollout) -> Iterator[Tensor]:
    targets, old_logprobs, advantages, mask = rollout
    leaf = logits.clone().requires_grad_()
    out = logprobs(leaf, targets, ref_logits=ref_logits, backend="cpu")
    yield from (out.logprobs, out.entropy, out.kl)
    yield from torch.autograd.grad((out.logprobs + out.entropy + out.kl).sum(), leaf)
    leaves = [x.detach().clone().requires_grad_() for x in (out.logprobs, out.entropy, out.kl)]
    for loss in ("ppo_clip", "gspo"):
        for aggregation in ("token_mean", "sequence_mean"):
            spec = PolicyLossSpec(loss, kl_coef=0.1, entropy_coef=0.1, aggregation=aggregation)
            out = policy_loss(
                leaves[0], old_logprobs, advantages, mask, spec, entropy=leaves[1], kl=leaves[2],
                num_items=259, backend="cpu",
            )  # fmt: skip
            yield from (out.loss, *out.stats)
            yield from torch.autograd.grad(out.loss, leaves)
    out = value_loss(leaves[0], old_logprobs, advantages, mask, cliprange_value=0.2, backend="cpu")
    yield from (out.loss, out.stats.clipfrac, *torch.autograd.grad(out.loss, leaves[:1]))
    yield from gae(advantages, old_logprobs, mask, gamma=0.99, lam=0.95, backend="cpu")
    yield whiten(advantages, mask, backend="cpu")


def _other_ops(logits) -> Iterator[Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    yield from sample(logits, generator=generator, backend="cpu")
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(logits.to(dtype, copy=True))
        optimizer = AdamW8bit([parameter], min_8bit_size=4096, backend="cpu")
        for _ in range(2):
            parameter.grad = parameter.detach() / 3
            optimizer.step()
        yield from (parameter, *optimizer.state[parameter].values())


def _every_op(given) -> list[Tensor]:
    head, logits, ref_logits, rollout = given
    flat = logits.reshape(-1, logits.shape[-1])
    return [
        *_head_ops(head, rollout), *_token_ops(logits, ref_logits, rollout), *_other_ops(flat),
    ]  # fmt: skip


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(20).view(4, 5) % 4 != 1
    targets = torch.randint(0, 1003, (4, 5), generator=generator)
    rollout = (targets, normal(4, 5) / 5 - 7, normal(4, 5), mask)
    head = (normal(4, 5, 16).bfloat16(), normal(1003, 16).bfloat16(), normal(1003))
    return head, normal(4, 5, 1003), normal(4, 5, 1003), rollout


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_no_bit(given, dtype):
    expected = _every_op(given)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = _every_op(given)
    finally:
        torch.set_default_dtype(default)
    _assert_same(found, expected)


def test_the_default_device_changes_no_bit(given):
    expected = _every_op(given)
    try:
        torch.set_default_device("meta")
        found = _every_op(given)
    finally:
        torch.set_default_device(None)
    _assert_same(found, expected)


def _assert_same(found, expected):
    assert len(found) == len(expected) > 80
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.dtype == y.dtype and x.device == y.device, i
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), i
