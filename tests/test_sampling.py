"""Samples follow the distribution, come with its log-probability, and are never impossible."""

import pytest
import torch
from backends import ON_CPU

from fastrlhf_kernels import TruncatedSamplingWarning, _cpu, sample

needs_csrc = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_csrc)]


def draw(logits, backend="auto", seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return sample(logits, generator=generator, backend=backend, **{"temperature": 1.0, **options})


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies(backend):
    logits = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0])
    tokens, logprobs = draw(logits.expand(40_000, 5), backend, temperature=0.7)
    probs = (logits / 0.7).softmax(-1)
    shares = torch.bincount(tokens, minlength=5) / 40_000
    # Four standard deviations of a share near one half are 0.01.
    assert (shares - probs).abs().max() < 0.01
    assert shares[3] == 0
    torch.testing.assert_close(logprobs, probs.log()[tokens])
    assert (shares - logits.softmax(-1)).abs().max() > 0.01


# 1003 and 2050 end in a ragged block; 300 stays within one.
@needs_csrc
@pytest.mark.parametrize("vocab", [1, 300, 1003, 2050])
def test_both_backends_pick_the_same_tokens(vocab):
    logits = 3 * torch.randn(200, vocab, generator=torch.Generator().manual_seed(1))
    temperature = torch.linspace(0.5, 2, 200)
    tokens, logprobs = draw(logits, "cpu", temperature=temperature)
    expected, expected_logprobs = draw(logits, "reference", temperature=temperature)
    assert (tokens != expected).sum() <= 1  # a uniform number may fall onto a rounded step
    same = tokens == expected
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_distribution(backend, uniform, monkeypatch):
    logits = torch.full((3, 2500), -torch.inf)
    logits[:, 7], logits[:, 2077] = -1e4, -1e4
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), uniform))
    tokens, logprobs = draw(logits, backend)
    assert tokens.tolist() == [7 if uniform == 0 else 2077] * 3
    torch.testing.assert_close(logprobs, torch.full((3,), 0.5).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_see_each_other_and_layout_does_not_matter(backend):
    logits = torch.randn(6, 1003)
    tokens, logprobs = draw(logits, backend)
    wide = torch.full((6, 2006), torch.nan)
    wide[:, ::2] = logits
    strided = draw(wide[:, ::2], backend)
    assert torch.equal(tokens, strided[0]) and torch.equal(logprobs, strided[1])
    low = logits.bfloat16()
    assert torch.equal(draw(low, backend)[1], draw(low.float(), backend)[1])
    assert sample(logits[:0], temperature=1.0, backend=backend)[0].shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_and_top_p_narrow_the_choice_and_warn(backend):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(2000, 4)
    with pytest.warns(TruncatedSamplingWarning):
        tokens, logprobs = draw(logits, backend, top_k=2)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs, logits[0][tokens])
    for top_p, kept in ((0.4, {0}), (0.7, {0, 1}), (0.8, {0, 1, 2}), (0.95, {0, 1, 2, 3})):
        with pytest.warns(TruncatedSamplingWarning):
            assert set(draw(logits, backend, top_p=top_p)[0].tolist()) == kept


@needs_csrc
@pytest.mark.filterwarnings("ignore::fastrlhf_kernels.TruncatedSamplingWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [7, 1003, 2050])
def test_both_backends_narrow_alike(vocab, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(300, vocab, generator=generator)).to(dtype)
    logits[::3, ::2] = -torch.inf
    temperature = torch.linspace(0.5, 2, 300)
    whole = draw(logits, "cpu", temperature=temperature)[0]
    # Low precision has many equal logits; beyond the finite entries top_k keeps what there is.
    for options in (
        {"top_k": 1}, {"top_k": 5}, {"top_k": vocab - 2}, {"top_k": vocab + 5},
        {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 6, "top_p": 0.7},
    ):  # fmt: skip
        tokens, logprobs = draw(logits, "cpu", temperature=temperature, **options)
        expected, expected_logprobs = draw(logits, "reference", temperature=temperature, **options)
        same = tokens == expected
        assert (~same).sum() <= 2, options
        torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=0, atol=2e-6)
        if vocab > 7 and (options.get("top_k") == 5 or options.get("top_p") == 0.3):
            assert (tokens != whole).sum() > 20  # the choice was narrowed


@needs_csrc
@pytest.mark.filterwarnings("ignore::fastrlhf_kernels.TruncatedSamplingWarning")
def test_what_is_kept_at_the_edge(monkeypatch):
    # Four equal logits: top_k keeps all of them, top_p the first ones that reach its mass.
    logits = torch.full((1, 1500), -5.0)
    equal = [3, 700, 1100, 1400]
    logits[0, equal] = 4.0
    for options, kept in (
        ({"top_k": 2}, equal), ({"top_p": 0.4}, equal[:2]), ({"top_p": 1e-6}, equal[:1]),
    ):  # fmt: skip
        for uniform, token in ((0.0, kept[0]), (1 - 2**-24, kept[-1])):
            monkeypatch.setattr(torch, "rand", lambda n, u=uniform, **_: torch.full((n,), u))
            assert draw(logits, "cpu", **options)[0].item() == token
            assert draw(logits, "reference", **options)[0].item() == token


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_raises(backend):
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"\[5\]"):
        draw(logits[0], backend)
    for temperature in (0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="temperature"):
            draw(logits, backend, temperature=temperature)
    for options in ({"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="top_"):
            draw(logits, backend, **options)
    for bad in (torch.nan, -torch.inf):
        with pytest.raises(ValueError, match="NaN or no finite entry"):
            draw(torch.full((2, 5), bad), backend)


@pytest.mark.parametrize("backend", ON_CPU)
def test_given_numbers_go_through_the_inverse_of_the_distribution(backend):
    """Evenly spaced numbers give each token its share of them, to one, and in its order."""
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(4))
    logits[[0, 7, 8, 39]] = -torch.inf
    count = 160
    uniform = (torch.arange(count) + 0.5) / count
    rows = logits.expand(count, 40)
    tokens, logprobs = sample(rows, temperature=0.7, uniform=uniform, backend=backend)
    probs = (logits.double() / 0.7).softmax(-1)
    assert (torch.bincount(tokens, minlength=40) - count * probs).abs().max() <= 1
    assert (tokens.diff() >= 0).all()
    torch.testing.assert_close(logprobs, probs.log()[tokens].float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_same_number_gives_the_same_token_wherever_its_row_is(backend):
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(24, 1003, generator=generator)
    uniform = torch.rand(24, generator=generator)
    tokens, logprobs = sample(logits, uniform=uniform, backend=backend)
    again = sample(logits, uniform=uniform, backend=backend)
    assert torch.equal(tokens, again[0]) and torch.equal(logprobs, again[1])
    order = torch.randperm(24, generator=generator)
    moved = sample(logits[order], uniform=uniform[order], backend=backend)
    table = torch.stack([1 - uniform, uniform], dim=1)  # a column of it is not contiguous
    column = sample(logits, uniform=table[:, 1], backend=backend)
    assert torch.equal(column[0], tokens)
    assert torch.equal(tokens[order], moved[0]) and torch.equal(logprobs[order], moved[1])
    other = sample(logits, uniform=1 - uniform, backend=backend)
    assert (tokens != other[0]).any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_token_without_probability_is_never_drawn(backend):
    """Not by the smallest and largest number, nor by those on the edge of another token."""
    logits = torch.full((6, 2500), -torch.inf)
    likely = torch.tensor([7, 1030, 1031, 2077])
    logits[:, likely] = 3.0
    uniform = torch.tensor([0.0, 2**-24, 0.25, 0.5, 0.75, 1 - 2**-24])
    tokens, logprobs = sample(logits, uniform=uniform, backend=backend)
    assert tokens.tolist() == [7, 7, 1030, 1031, 2077, 2077]
    torch.testing.assert_close(logprobs, torch.full((6,), 0.25).log())


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("vocab", [1, 300, 2050])
def test_every_backend_draws_what_float64_draws(vocab, backend):
    """The number lies in the token's stretch of the distribution, but for rounding."""
    generator = torch.Generator().manual_seed(6)
    logits = 3 * torch.randn(48, vocab, generator=generator)
    uniform = torch.rand(48, generator=generator)
    tokens, _ = sample(logits, temperature=1.3, uniform=uniform, backend=backend)
    ends = (logits.double() / 1.3).softmax(-1).cumsum(-1)
    end = ends.gather(1, tokens[:, None])[:, 0]
    start = torch.where(tokens > 0, ends.gather(1, (tokens - 1).clamp_min(0)[:, None])[:, 0], 0)
    assert (start - 1e-6 <= uniform).all() and (uniform < end + 1e-6).all()


def test_numbers_of_another_shape_or_type_raise():
    logits = torch.randn(3, 5)
    for uniform in (torch.rand(2), torch.rand(3, 1), torch.rand(3).double()):
        with pytest.raises(ValueError, match="uniform is"):
            sample(logits, uniform=uniform)
