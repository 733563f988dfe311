"""Triton's sampling against the reference: the same tokens for the same uniform numbers.

Blocks of 16 columns; 40 end in a ragged one, 48 are aligned.
"""

import math

import pytest
import torch

from fastrlhf_kernels import reference, sample

pytest.importorskip("triton")

from fastrlhf_kernels import _triton_sampling

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_triton_sampling, "BLOCK", 16)


def rows(device, b=6, v=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(b * v)
    logits = 3 * torch.randn(b, v, generator=generator)
    uniform = torch.rand(b, generator=generator)
    return logits.to(device, dtype), torch.linspace(0.5, 2, b).to(device), uniform.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_s_tokens(device, dtype):
    logits, temperature, uniform = rows(device, b=8, dtype=dtype)
    tokens, logprobs = _triton_sampling.sample(logits, temperature, uniform, 0, 1.0)
    expected, expected_logprobs = reference.sample(logits, temperature, uniform, 0, 1.0)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, expected)
    # The reference is float64 inside.
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=2e-6)
    assert (logprobs <= 0).all()
    if dtype != torch.float32:
        return
    # The bound can fail: a temperature off by 1 %, another uniform number.
    _, wrong = _triton_sampling.sample(logits, 1.01 * temperature, uniform, 0, 1.0)
    assert (wrong - expected_logprobs).abs().max() > 1e-3
    wrong, _ = _triton_sampling.sample(logits, temperature, uniform.flip(0), 0, 1.0)
    assert not torch.equal(wrong, expected)


NARROWED = [(1, 1.0), (7, 1.0), (1000, 1.0), (0, 0.6), (9, 0.8)]


@pytest.mark.parametrize(("top_k", "top_p"), NARROWED)
def test_top_k_and_top_p_without_a_sort(device, monkeypatch, top_k, top_p):
    monkeypatch.setattr(_triton_sampling, "BLOCK", 32)
    logits, temperature, _ = rows(device, b=3, v=48 if top_k == 7 else 40)
    logits[1, 5:30] = -torch.inf
    # Not one token more or less: the ends of the distribution are those of the reference.
    ends = torch.tensor([0.0, 0.5, 1 - 2**-24], device=device)
    tokens, logprobs = _triton_sampling.sample(logits, temperature, ends, top_k, top_p)
    expected, expected_logprobs = reference.sample(logits, temperature, ends, top_k, top_p)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=2e-6)
    whole, _ = reference.sample(logits, temperature, ends, 0, 1.0)
    assert (top_k == 1000) == torch.equal(tokens, whole)


def test_ties_stay_together(device):
    logits = torch.tensor([[1.0, 2.0, -0.0, 2.0, 0.0, 2.0, -1.0]], device=device).expand(3, -1)
    ones, ends = torch.ones(3, device=device), torch.tensor([0.0, 0.5, 1 - 2**-24], device=device)
    # The second largest is one of three 2s. Half of the mass takes two of them, and so all three.
    for top_k, top_p in ((2, 1.0), (0, 0.5)):
        tokens, _ = _triton_sampling.sample(logits, ones, ends, top_k, top_p)
        assert tokens.tolist() == [1, 3, 5]
    # 0 and −0 are one value.
    tokens, _ = _triton_sampling.sample(logits[:, [2, 4, 6]], ones, ends, 1, 1.0)
    assert tokens.tolist()[::2] == [0, 1]


def test_frequencies(device, monkeypatch):
    monkeypatch.setattr(_triton_sampling, "BLOCK", 8)
    logits = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0], device=device)
    n = 48
    comb = (torch.arange(n, device=device) + 0.5) / n
    tokens, logprobs = _triton_sampling.sample(
        logits.expand(n, 5), torch.full((n,), 0.7, device=device), comb, 0, 1.0
    )
    probs = (logits / 0.7).softmax(-1)
    shares = torch.bincount(tokens, minlength=5) / n
    # Every tooth of the comb counts 1/n: each share is within two of them.
    assert (shares - probs).abs().max() <= 2 / n and shares[3] == 0
    assert (shares - logits.softmax(-1)).abs().max() > 2 / n
    torch.testing.assert_close(logprobs, probs.log()[tokens])


def test_rows_without_a_distribution(device):
    logits, temperature, uniform = rows(device)
    expected, _ = reference.sample(logits[3:], temperature[3:], uniform[3:], 0, 1.0)
    logits[0], logits[1, 3], logits[2, 20] = -torch.inf, torch.nan, torch.inf
    for top_k in (0, 5):
        tokens, logprobs = _triton_sampling.sample(logits[:4], temperature, uniform, top_k, 1.0)
        assert tokens[:3].tolist() == [-1] * 3 and logprobs[:3].eq(0).all() and tokens[3] >= 0
    # A NaN has a sign, which its bits sort by: a few operations give it.
    logits[1, 3] = -math.nan
    tokens, _ = _triton_sampling.sample(logits, temperature, uniform, 0, 1.0)
    assert tokens[1] == -1 and torch.equal(tokens[3:], expected)
    nothing = _triton_sampling.sample(logits[:0], temperature[:0], uniform[:0], 0, 1.0)
    assert [x.shape for x in nothing] == [(0,), (0,)]


def test_the_op(device):
    logits, temperature, _ = rows(device, b=2, dtype=torch.bfloat16)

    def draw(backend, x=logits):
        generator = torch.Generator(device).manual_seed(3)
        return sample(x, temperature=temperature, generator=generator, backend=backend)

    (tokens, logprobs), (expected, expected_logprobs) = draw("triton"), draw("reference")
    assert torch.equal(tokens, expected) and logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=2e-6)
    if device.type == "cpu":  # elsewhere it would wait for the device
        with pytest.raises(ValueError, match=r"no finite entry.*\[2, 40\]"):
            draw("triton", logits * torch.nan)
    with pytest.raises(ValueError, match="float64"):
        draw("triton", logits.double())


def test_strides_extremes_and_the_same_bits(device):
    logits, temperature, uniform = rows(device, b=3)
    first = _triton_sampling.sample(logits, temperature, uniform, 0, 1.0)
    wide = torch.full((3, 90), torch.nan, device=device)
    wide[:, 3:83:2] = logits
    for given in (logits, wide[:, 3:83:2]):
        again = _triton_sampling.sample(given, temperature, uniform, 0, 1.0)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
    alone = _triton_sampling.sample(logits[1:2], temperature[1:2], uniform[1:2], 0, 1.0)
    assert all(torch.equal(x, y[1:2]) for x, y in zip(alone, first, strict=True))
    # Steps of 1/64 are exact at 1e4.
    logits = (logits * 64).round() / 64
    for offset in (-1e4, 1e4):
        given = (logits + offset, temperature, uniform)
        tokens, logprobs = _triton_sampling.sample(*given, 0, 1.0)
        expected, expected_logprobs = reference.sample(*given, 0, 1.0)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=2e-6)


def test_variants_name_every_argument():
    listed = list(_triton_sampling.variants("sm_80"))
    assert len({(x.config, x.dtype) for x in listed}) == len(listed) == 12
    for x in listed:
        assert list(x.signature) == list(x.kernel.arg_names)
