"""linear_logprobs: the reference against autograd, the CPU kernels against float64 truth.

The tolerance is eager float32's own error against float64 plus a slack; mutations show that it can
fail. Sizes: 1003 is no multiple of anything, 1024 is one block of columns, 49159 is a real
vocabulary and a ragged tail; workspace_mb=0.05 makes every problem take several chunks and tiles.
"""

import pytest
import torch
from backends import ON_CPU, cpu_only

from fastrlhf_kernels import linear_logprobs, reference
from fastrlhf_kernels._records import EXTRA_STATS

SLACK = 5e-7
TOKENS = ("logprobs", "entropy", "kl")


def call(p, *, backend, head=("weight", "bias", "ref_hidden", "ref_weight", "ref_bias"), **options):
    given = {name: getattr(p, name) for name in head if name != "weight"}
    targets = p.targets.masked_fill(~p.mask, -100)
    return linear_logprobs(
        p.hidden, p.weight, targets, backend=backend,
        **{"workspace_mb": 0.05, **given, **options},
    )  # fmt: skip


def gradients(p, *, backend, sign=1.0, **options):
    """Outputs and gradients of a fixed random combination of them."""
    leaves = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    out = call(p, backend=backend, **options)
    generator = torch.Generator().manual_seed(5)
    total = 0
    for name, factor in zip(TOKENS, (1.0, 1.0, sign), strict=True):
        weights = torch.randn(p.targets.shape, generator=generator, dtype=torch.float64)
        total = total + factor * (weights.to(out.logprobs.dtype) * getattr(out, name)).sum()
    return [getattr(out, name).detach() for name in TOKENS], torch.autograd.grad(total, leaves)


def test_reference_is_the_textbook(head_problem):
    p = head_problem()
    out = call(p, backend="reference")
    log_probs = (p.hidden @ p.weight.T + p.bias).log_softmax(-1)
    ref_log_probs = (p.ref_hidden @ p.ref_weight.T + p.ref_bias).log_softmax(-1)
    kl = torch.nn.functional.kl_div(ref_log_probs, log_probs, reduction="none", log_target=True)
    expected = (
        log_probs.gather(-1, p.targets[:, None]).squeeze(-1),
        torch.distributions.Categorical(logits=log_probs).entropy(),
        kl.sum(-1),
    )
    for name, x in zip(TOKENS, expected, strict=True):
        torch.testing.assert_close(getattr(out, name), torch.where(p.mask, x, 0))
    reverse = call(p, backend="reference", kl_direction="reverse").kl
    kl = torch.nn.functional.kl_div(log_probs, ref_log_probs, reduction="none", log_target=True)
    torch.testing.assert_close(reverse, torch.where(p.mask, kl.sum(-1), 0))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_reference_gradcheck(head_problem, direction):
    p = head_problem(4, 3, 7)
    options = {"temperature": 0.7, "softcap": 3.0, "logit_scale": 0.5, "kl_direction": direction}

    def outputs(hidden, weight, bias):
        out = linear_logprobs(
            hidden, weight, p.targets, bias=bias, ref_hidden=p.ref_hidden,
            ref_weight=p.ref_weight, backend="reference", **options,
        )  # fmt: skip
        return out.logprobs, out.entropy, out.kl

    leaves = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    assert torch.autograd.gradcheck(outputs, leaves)


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "row temperatures": {"temperature": torch.linspace(0.5, 2, 13)},
    "soft cap and scale": {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5},
    "reverse": {"kl_direction": "reverse"},
    "padded vocabulary": {"valid_vocab": 901, "kl_direction": "reverse"},
}


def within(errors, eager_errors):
    return all(a <= b + SLACK for a, b in zip(errors, eager_errors, strict=True))


def no_worse(relative_rms, ours, eager, truth):
    for got, plain, true in zip(ours, eager, truth, strict=True):
        errors = [relative_rms(x, t) for x, t in zip(got, true, strict=True)]
        eager_errors = [relative_rms(x, t) for x, t in zip(plain, true, strict=True)]
        assert within(errors, eager_errors), (errors, eager_errors)


@cpu_only
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [1003, 1024])
def test_cpu_is_as_close_to_the_truth_as_eager_float32(head_problem, relative_rms, case, vocab):
    options = CASES[case]
    p = head_problem(v=vocab)
    if "valid_vocab" in options:
        p.targets.clamp_(max=900)
    truth = gradients(p, backend="reference", **options)
    eager = gradients(p.to(torch.float32), backend="reference", **options)
    ours = gradients(p.to(torch.float32), backend="cpu", **options)
    no_worse(relative_rms, ours, eager, truth)
    if case != "plain":
        return
    # The rule can fail: a flipped sign, a dropped mask.
    flipped = gradients(p.to(torch.float32), backend="cpu", sign=-1.0)[1]
    errors = [relative_rms(x, t) for x, t in zip(flipped, truth[1], strict=True)]
    assert not within(errors[:1], [0.0]) and not within(errors[1:2], [0.0])
    unmasked = p.to(torch.float32)
    unmasked.mask.fill_(True)
    assert relative_rms(call(unmasked, backend="cpu").logprobs, truth[0][0]) > 1e-2


@pytest.mark.parametrize("backend", ON_CPU)
def test_identities(head_problem, backend):
    p = head_problem().to(torch.float32)
    tempered = call(p, backend=backend, temperature=torch.full((13,), 0.5))
    for options in ({"logit_scale": 2.0}, {"temperature": 0.5}):
        same = call(p, backend=backend, **options)
        assert all(torch.equal(x, y) for x, y in zip(tempered[:3], same[:3], strict=True))
    same = linear_logprobs(
        p.hidden, p.weight, p.targets, bias=p.bias, ref_hidden=p.hidden, backend=backend
    )
    assert same.kl.eq(0).all()
    assert (same.logprobs <= 0).all() and (same.entropy > 0).all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_padded_vocabulary_is_a_truncated_head(head_problem, backend):
    p = head_problem().to(torch.float32)
    targets = p.targets.clamp(max=899)
    cut = {"bias": p.bias[:900], "ref_weight": p.ref_weight[:900], "ref_bias": p.ref_bias[:900]}
    truncated = linear_logprobs(
        p.hidden, p.weight[:900], targets, ref_hidden=p.ref_hidden, backend=backend, **cut
    )
    weight = p.weight.clone().requires_grad_()
    weight.data[900:] = torch.nan
    padded = linear_logprobs(
        p.hidden, weight, targets, bias=p.bias, ref_hidden=p.ref_hidden,
        ref_weight=p.ref_weight, ref_bias=p.ref_bias, valid_vocab=900, backend=backend,
    )  # fmt: skip
    for x, y in zip(truncated[:3], padded[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)
    whole = call(p, backend=backend).entropy
    assert (whole[p.mask] - padded.entropy[p.mask]).abs().max() > 1e-3
    padded.logprobs.sum().backward()
    assert weight.grad[900:].eq(0).all() and weight.grad[:900].isfinite().all()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("offset", [-1e4, 1e4, -3e4])
def test_extreme_logits(backend, offset):
    generator = torch.Generator().manual_seed(0)
    # One hidden unit whose weight is the logit itself, so that float32 holds it exactly.
    logits = (torch.randn(1003, generator=generator) * 64).round() / 64 * 3 + offset
    ref = (torch.randn(1003, generator=generator) * 64).round() / 64 * 3 - offset
    targets = torch.tensor([5])
    one = torch.ones(1, 1)
    out = linear_logprobs(
        one, logits[:, None], targets, ref_hidden=one, ref_weight=ref[:, None], backend=backend
    )
    true, ref_true = logits.double().log_softmax(-1), ref.double().log_softmax(-1)
    assert (out.logprobs - true[5]).abs() < 2e-5
    assert (out.entropy + (true.exp() * true).sum()).abs() < 2e-5
    assert (out.kl - (true.exp() * (true - ref_true)).sum()).abs() < 2e-5


@pytest.mark.parametrize("backend", ON_CPU)
def test_logits_of_minus_infinity_do_not_exist(backend):
    hidden = torch.randn(3, 4).requires_grad_()
    weight, bias = torch.randn(2100, 4), torch.zeros(2100)
    bias[7:2060] = -torch.inf
    targets = torch.tensor([0, 3, 6])
    out = linear_logprobs(
        hidden, weight, targets, bias=bias, ref_hidden=hidden + 0.1, backend=backend
    )
    kept = torch.cat((torch.arange(7), torch.arange(2060, 2100)))
    small = linear_logprobs(
        hidden.detach(), weight[kept], targets, ref_hidden=hidden + 0.1, backend=backend
    )
    for x, y in zip(out[:3], small[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    sum(x.sum() for x in out[:3]).backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_do_not_round_the_logits(head_problem, backend, dtype):
    p = head_problem(n=9, d=64, v=1003, scale=1.2).to(dtype)
    true = p.to(torch.float64)
    logits = true.hidden @ true.weight.T
    assert 20 < logits.abs().max() <= 45
    out = call(p, backend=backend, head=("ref_hidden",))
    exact = call(true, backend="reference", head=("ref_hidden",))
    for x, y in zip(out[:3], exact[:3], strict=True):
        assert x.dtype == torch.float32
        assert (x - y).abs().max() <= 2e-5
    rounded = logits.to(dtype).double().log_softmax(-1).gather(-1, p.targets[:, None]).squeeze(-1)
    assert (rounded - exact.logprobs)[p.mask].abs().max() > 1e-3


@cpu_only
def test_low_precision_gradients(head_problem, relative_rms):
    p = head_problem(n=9, d=64).to(torch.bfloat16)
    truth = gradients(p.to(torch.float64), backend="reference")[1]
    eager = gradients(p.to(torch.bfloat16), backend="reference")[1]
    ours = gradients(p.to(torch.bfloat16), backend="cpu")[1]
    errors, eager_errors = (
        [relative_rms(x, t) for x, t in zip(got, truth, strict=True)] for got in (ours, eager)
    )
    assert [x.dtype for x in ours] == [torch.bfloat16] * 3
    assert within(errors, [1.05 * x for x in eager_errors]), (errors, eager_errors)


@pytest.mark.parametrize("backend", ON_CPU)
def test_ignored_rows_are_never_read(head_problem, backend):
    p = head_problem().to(torch.float32)
    clean = gradients(p, backend=backend)
    poisoned = p.rows(slice(None))
    for x in (poisoned.hidden, poisoned.ref_hidden):
        x.data[~p.mask] = torch.nan
    outputs, grads = gradients(poisoned, backend=backend)
    for x, y in zip((*outputs, *grads), (*clean[0], *clean[1]), strict=True):
        assert torch.equal(x, y)
    assert all(x[~p.mask].eq(0).all() for x in (*outputs, grads[0]))


@pytest.mark.parametrize("backend", ON_CPU)
def test_shapes_layouts_and_empty_input(head_problem, backend):
    p = head_problem(12).to(torch.float32)
    p.mask.fill_(True)
    flat = call(p, backend=backend)
    batched = linear_logprobs(
        p.hidden.reshape(3, 4, -1), p.weight, p.targets.reshape(3, 4), bias=p.bias,
        ref_hidden=p.ref_hidden.reshape(3, 4, -1), ref_weight=p.ref_weight, ref_bias=p.ref_bias,
        temperature=torch.ones(3, 4), workspace_mb=0.05, backend=backend,
    )  # fmt: skip
    wide = torch.full((12, 32), torch.nan)
    wide[:, ::2] = p.hidden
    strided = linear_logprobs(wide[:, ::2], p.weight, p.targets, bias=p.bias, backend=backend)
    transposed = linear_logprobs(
        p.hidden, p.weight.t().contiguous().t(), p.targets, bias=p.bias, backend=backend
    )
    for name in TOKENS:
        assert torch.equal(getattr(batched, name).reshape(-1), getattr(flat, name))
    for other in (strided, transposed):
        torch.testing.assert_close(other.logprobs, flat.logprobs, rtol=0, atol=2e-6)
    for n in (0, 1):
        hidden = p.hidden[:n].clone().requires_grad_()
        out = linear_logprobs(hidden, p.weight, p.targets[:n], bias=p.bias, backend=backend)
        out.logprobs.sum().backward()
        assert out.logprobs.shape == (n,) and hidden.grad.shape == (n, 16)
        torch.testing.assert_close(out.logprobs, flat.logprobs[:n], rtol=0, atol=2e-6)


@cpu_only
def test_a_real_vocabulary(head_problem, relative_rms):
    p = head_problem(3, 8, 49_159)
    p.mask.fill_(True)
    truth = gradients(p, backend="reference")
    eager = gradients(p.to(torch.float32), backend="reference")
    ours = gradients(p.to(torch.float32), backend="cpu", workspace_mb=2)
    no_worse(relative_rms, ours, eager, truth)


@cpu_only
def test_bits_repeat_and_a_row_hardly_knows_its_neighbours(head_problem):
    p = head_problem(40).to(torch.float32)
    p.mask.fill_(True)
    first, second = (gradients(p, backend="cpu") for _ in range(2))
    for x, y in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(x, y)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = call(p.rows(order), backend="cpu")
    for name, x in zip(TOKENS, first[0], strict=True):
        torch.testing.assert_close(getattr(shuffled, name), x[order], rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", CASES)
def test_extra_statistics(head_problem, backend, name):
    p, options = head_problem(), CASES[name]
    if "valid_vocab" in options:
        p.targets.clamp_(max=900)
    given = {k: x for k, x in options.items() if k != "kl_direction"}
    kept = options.get("valid_vocab", 1003)
    temperature = torch.as_tensor(given.get("temperature", 1.0)).double().expand(13)
    logits = reference.head_logits(
        p.hidden, p.weight, p.bias, temperature, valid_vocab=kept,
        logit_scale=given.get("logit_scale", 1.0), softcap=given.get("softcap"),
    )  # fmt: skip
    p.targets[::3] = logits[::3].argmax(-1)
    expected = {
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == p.targets,
        "log_sum_sq_probs": logits.softmax(-1).square().sum(-1).log(),
    }
    # Several tiles, with and without a reference, one statistic and all of them.
    small = p.to(torch.float32)
    for names in (EXTRA_STATS, ("log_sum_sq_probs",)):
        for head in (("bias",), ("bias", "ref_hidden", "ref_weight", "ref_bias")):
            out = call(small, backend=backend, head=head, stats=names, **options)
            assert tuple(out.extra) == names
            for x in names:
                truth = torch.where(p.mask, expected[x], 0).to(expected[x].dtype)
                got = out.extra[x]
                assert not got.requires_grad and got.shape == p.targets.shape
                torch.testing.assert_close(got, truth.to(got.dtype), rtol=2e-6, atol=2e-6)
    assert out.extra["log_sum_sq_probs"].ne(0).equal(p.mask)
