"""Properties that hold for every shape and value, searched by hypothesis.

The backends are compared with the reference in float64. What float32 can hold is the logits' own
rounding: |z|·2⁻²³ for logits of that size, which bounds what a log-probability can be off by.
"""

import math

import pytest
import torch
from backends import BACKENDS, KERNELS, place
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf_kernels import (
    PolicyLossSpec,
    gae,
    linear_logprobs,
    linear_policy_loss,
    logprobs,
    sample,
    whiten,
)
from fastrlhf_kernels._records import AGGREGATIONS, LOSSES

searched = settings(max_examples=25, deadline=None, derandomize=True)
searched_briefly = settings(searched, max_examples=8)  # the interpreter is slow

seeds = st.integers(0, 2**31)
sizes = st.integers(0, 9)
# Around the CPU kernels' block of 1024 columns, and anything below.
vocabularies = st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 2049]))
scales = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])
offsets = st.sampled_from([0.0, -1e4, 1e4])
temperatures = st.floats(0.1, 10.0)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("backend", KERNELS)
@searched
@given(seeds, sizes, vocabularies, scales, offsets, temperatures, dtypes)
def test_logprobs(device, backend, seed, n, v, scale, offset, temperature, dtype):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float16:
        scale, offset = min(scale, 1e3), 0.0
    logits = (scale * normal(generator, n, v) + offset).to(dtype)
    ref = (scale * normal(generator, n, v)).to(dtype)
    targets = torch.randint(0, v, (n,), generator=generator)
    at = place(backend, device)
    given_ = {"ref_logits": ref.to(at), "temperature": temperature}
    out = logprobs(logits.to(at), targets.to(at), backend=backend, **given_)
    given_["ref_logits"] = ref.double()
    truth = logprobs(logits.double(), targets, backend="reference", **given_)
    size = float(logits.double().abs().max()) if logits.numel() else 0.0
    slack = 4e-6 * (1 + (size + scale) / temperature)
    for got, true in zip(out[:3], truth[:3], strict=True):
        torch.testing.assert_close(got.cpu().double(), true, rtol=1e-5, atol=slack)
    assert (out.logprobs <= 0).all() and (out.kl >= 0).all()
    assert (out.entropy >= 0).all() and (out.entropy <= math.log(v) + 1e-5).all()


@pytest.mark.parametrize("backend", KERNELS)
@searched_briefly
@given(
    seeds, sizes, st.integers(1, 40), vocabularies, st.sampled_from(LOSSES),
    st.sampled_from(AGGREGATIONS), st.floats(0, 0.5), st.booleans(),
)  # fmt: skip
def test_linear_policy_loss(device, backend, seed, n, d, v, loss, aggregation, coefficient, shared):
    generator = torch.Generator().manual_seed(seed)
    hidden, ref_hidden = normal(generator, 2, n, d) / d**0.5
    weight, ref_weight = normal(generator, 2, v, d)
    targets = torch.randint(0, v, (n,), generator=generator)
    mask = torch.rand(n, generator=generator) < 0.7
    advantages = normal(generator, n) * (torch.rand(n, generator=generator) < 0.7)
    spec = PolicyLossSpec(
        loss, kl_coef=coefficient, entropy_coef=coefficient / 2, aggregation=aggregation,
        old_kl_coef=coefficient if loss == "ppo_kl" else 0.0,
    )  # fmt: skip
    old = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    old = old + 0.1 * normal(generator, n)

    def run(dtype, backend):
        where = place(backend, device)

        def at(x):
            return x.to(dtype).to(where)

        leaves = [at(hidden).requires_grad_(), at(weight).requires_grad_(not shared)]
        out = linear_policy_loss(
            *leaves, targets.to(where), at(old), at(advantages), mask.to(where), spec,
            ref_hidden=at(ref_hidden), ref_weight=None if shared else at(ref_weight),
            sequence_ids=(torch.arange(n) // 3).to(where), num_items=7, backend=backend,
        )  # fmt: skip
        wanted = [x for x in leaves if x.requires_grad]
        found = [out.loss, *out.stats, *torch.autograd.grad(out.loss, wanted)]
        return [x.detach().cpu().double() for x in found]

    truth = run(torch.float64, "reference")
    for got, true in zip(run(torch.float32, backend), truth, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@searched_briefly
@given(seeds, sizes, vocabularies, st.floats(-1e4, 1e4))
def test_a_bias_on_all_logits_changes_nothing(device, backend, seed, n, v, shift):
    generator = torch.Generator().manual_seed(seed)
    at = place(backend, device)
    hidden = normal(generator, n, 4).float().to(at)
    weight = normal(generator, v, 4).float().to(at)
    targets = torch.randint(0, v, (n,), generator=generator).to(at)
    alone = linear_logprobs(hidden, weight, targets, backend=backend)
    bias = torch.full((v,), shift, device=at)
    shifted = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend)
    slack = 4e-6 * (1 + abs(shift))
    torch.testing.assert_close(alone.logprobs, shifted.logprobs, rtol=1e-5, atol=slack)
    torch.testing.assert_close(alone.entropy, shifted.entropy, rtol=1e-5, atol=slack)


@searched
@given(seeds, st.integers(1, 8), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1))
def test_gae(seed, b, t, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = normal(generator, 2, b, t)
    mask = torch.rand(b, t, generator=generator) < 0.7
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(returns[mask], (advantages + values)[mask])
    assert advantages[~mask].eq(0).all() and returns[~mask].eq(0).all()
    if gamma == lam == 1:
        to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
        torch.testing.assert_close(returns[mask], to_go[mask])


@searched
@given(seeds, st.integers(2, 60), st.floats(-100, 100), st.floats(0.1, 100))
def test_whiten_forgets_shift_and_scale(seed, n, shift, scale):
    generator = torch.Generator().manual_seed(seed)
    x = normal(generator, n)
    mask = torch.ones(n, dtype=torch.bool)
    torch.testing.assert_close(
        whiten(x, mask), whiten(scale * x + shift, mask), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(whiten(x, mask, center=False).mean(), x.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@searched
@given(seeds, st.integers(1, 9), vocabularies, temperatures)
def test_sample(device, backend, seed, n, v, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = normal(generator, n, v).float()
    logits[torch.rand(n, v, generator=generator) < 0.3] = -torch.inf
    logits[:, 0] = 0.0
    at = place(backend, device)
    draw = torch.Generator(at).manual_seed(seed)
    tokens, found = sample(logits.to(at), temperature=temperature, generator=draw, backend=backend)
    expected = (logits / temperature).log_softmax(-1).gather(-1, tokens.cpu()[:, None])[:, 0]
    assert expected.isfinite().all()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
