"""The kernels under ttsem: every access inside its tensor, and no two programs race for an element.

`make sanitize` runs this file where ttsem executes each launch and fails it at the kernel's line
(an access out of bounds, a race, an undefined result; memory nobody wrote is NaN). Anywhere else
these tests are skipped: the interpreter does not see such faults. Sizes are ragged and span several
programs, because a race needs two.
"""

import sys

import pytest
import torch

from fastrlhf_kernels import (
    AdamW8bit,
    PolicyLossSpec,
    linear_logprobs,
    linear_policy_loss,
    logprobs,
)

if "ttsem" not in sys.modules:
    pytest.skip("runs under ttsem: make sanitize", allow_module_level=True)

import triton
import triton.language as tl

from fastrlhf_kernels import _triton_advantages, _triton_sampling, _triton_tokens

DTYPES = [torch.float32, torch.bfloat16]


@triton.jit
def shifted_kernel(x_ptr, out_ptr, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    if MASKED:
        tl.store(out_ptr + offs, x + 1.0, mask=offs < n)
    else:
        tl.store(out_ptr + offs, x + 1.0)


@triton.jit
def total_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0)))


def test_the_sanitizer_sees_a_missing_mask_and_a_race(device):
    x = torch.randn(100, device=device)
    out = torch.empty_like(x)
    shifted_kernel[(2,)](x, out, 100, MASKED=True, BLOCK=64)
    assert torch.equal(out, x + 1)
    with pytest.raises(Exception, match=r"writes 28 element\(s\) past the end"):
        shifted_kernel[(2,)](x, out, 100, MASKED=False, BLOCK=64)
    with pytest.raises(Exception, match=r"reads 1 element\(s\) past the end"):
        shifted_kernel[(2,)](x, out, 101, MASKED=True, BLOCK=64)
    with pytest.raises(Exception, match="write-write"):
        total_kernel[(2,)](x, out, 100, BLOCK=64)


def finite(*tensors) -> None:
    """What no program wrote is still NaN."""
    for x in tensors:
        assert bool(torch.isfinite(x.detach()).all())


def on(device, *tensors):
    return [x.to(device) for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_logprobs(head_problem, device, dtype, inplace):
    p = head_problem(v=1003).to(dtype)
    leaf, ref_logits = on(device, p.hidden @ p.weight.T, p.ref_hidden @ p.ref_weight.T)
    leaf.requires_grad_()
    out = logprobs(
        leaf * 1.0, p.targets.to(device), ref_logits=ref_logits, temperature=0.7,
        inplace_backward=inplace, backend="triton",
    )  # fmt: skip
    (out.logprobs + out.entropy + out.kl).sum().backward()
    finite(out.logprobs, out.entropy, out.kl, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reference", ["none", "shared", "separate"])
def test_linear_logprobs(head_problem, device, dtype, reference):
    p = head_problem(n=133, d=40, v=300).to(dtype)
    hidden, weight, bias = on(device, p.hidden, p.weight, p.bias)
    hidden.requires_grad_()
    options = {}
    if reference != "none":
        options["ref_hidden"] = p.ref_hidden.to(device)
    if reference == "separate":
        options |= dict(ref_weight=p.ref_weight.to(device), ref_bias=p.ref_bias.to(device))
        weight.requires_grad_()
    out = linear_logprobs(
        hidden, weight, p.targets.to(device) % 290, bias=bias, softcap=30.0, valid_vocab=290,
        stats=("is_top1",) if reference == "none" else (), backend="triton", **options,
    )  # fmt: skip
    loss = out.logprobs + out.entropy + (0 if out.kl is None else out.kl)
    loss.sum().backward()
    finite(out.logprobs, out.entropy, hidden.grad)
    if weight.requires_grad:
        finite(weight.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_policy_loss(head_problem, device, dtype, frozen):
    p = head_problem(n=133, d=40, v=300).to(dtype)
    hidden, weight, old, advantages = on(
        device, p.hidden, p.weight, p.old_logprobs.float(), p.advantages.float()
    )
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    out = linear_policy_loss(
        hidden, weight, p.targets.to(device), old, advantages, p.mask.to(device),
        PolicyLossSpec(kl_coef=0.1, entropy_coef=0.01), bias=p.bias.to(device),
        ref_hidden=p.ref_hidden.to(device), ref_weight=p.ref_weight.to(device), backend="triton",
    )  # fmt: skip
    out.loss.backward()
    finite(out.loss, hidden.grad, *([] if frozen else [weight.grad]))


@pytest.mark.parametrize("kl", ["none", "k3", "exact"])
def test_token_losses(device, kl):
    logprobs, old, advantages, weights, other = torch.randn(5, 700, device=device)
    mask = torch.arange(700, device=device) % 5 != 1
    spec = PolicyLossSpec(
        kl_coef=0.1 * (kl != "none"), entropy_coef=0.01, kl_estimator=kl if kl == "k3" else "exact"
    )
    derivatives, rows = _triton_tokens.policy_rows(
        spec, logprobs, old, advantages, weights * mask, 560, entropy=other,
        kl=other.abs() if kl == "exact" else None, ref_logprobs=None if kl == "none" else old,
        sequence_log_ratios=None,
    )  # fmt: skip
    # The last column is the KL, which there is only where it is computed.
    finite(derivatives, rows if kl == "exact" else rows[:, :-1])
    finite(_triton_tokens.value_rows(logprobs, old, advantages, mask, 0.2))


def test_advantages(device):
    rewards, values = torch.randn(2, 21, 300, device=device)
    mask = torch.ones(21, 300, dtype=torch.bool, device=device)
    finite(*_triton_advantages.gae(rewards, values, mask, 0.99, 0.95))
    finite(_triton_advantages.whiten(rewards, mask, True))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (20, 0.9)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample(device, dtype, top_k, top_p):
    logits = torch.randn(5, 1003, device=device).to(dtype)
    uniform = torch.rand(5, device=device)
    temperature = torch.full((5,), 0.9, device=device)
    tokens, picked = _triton_sampling.sample(logits, temperature, uniform, top_k, top_p)
    finite(picked)
    assert bool(((tokens >= 0) & (tokens < 1003)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw8bit(device, dtype):
    weight = torch.nn.Parameter(torch.randn(3, 5000, device=device).to(dtype))
    optimizer = AdamW8bit([weight], lr=1e-3, backend="triton")
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    finite(weight)
