"""logprobs: the reference against autograd, the CPU kernels against float64 truth.

The tolerance is the error of eager torch in the same dtype against float64 plus a slack; mutations
show that it can fail. Vocabularies: 7 is less than a vector, 1003 ends in a ragged block, 1024 is
one block of columns, 49157 is many and a ragged tail.
"""

import pytest
import torch
from backends import ON_CPU, cpu_only

from fastrlhf_kernels import forbid_vocab_tensors, linear_logprobs, logprobs
from fastrlhf_kernels.audit import VocabTensorError

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
TOKENS = ("logprobs", "entropy", "kl")
SLACK = 5e-7


def problem(n=13, v=1003, *, dtype=torch.float32, seed=0):
    """Logits, logits of a reference, and targets of which every fourth is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, v, generator=generator)
    ref_logits = logits + 0.3 * torch.randn(n, v, generator=generator)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.arange(n) % 4 == 1] = -100
    return logits.to(dtype), ref_logits.to(dtype), targets


def total_of(out, sign=1.0):
    """A fixed random combination of all the outputs."""
    generator = torch.Generator().manual_seed(5)
    total = 0
    for name, factor in zip(TOKENS, (1.0, 1.0, sign), strict=True):
        weights = torch.randn(out.logprobs.shape, generator=generator, dtype=torch.float64)
        total = total + factor * (weights.to(out.logprobs.dtype) * getattr(out, name)).sum()
    return total


def run(logits, ref_logits, targets, *, sign=1.0, **options):
    """The outputs and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    out = logprobs(leaf, targets, ref_logits=ref_logits, **options)
    (gradient,) = torch.autograd.grad(total_of(out, sign), leaf)
    return [x.detach() for x in out[:3]], gradient


def all_equal(one, two):
    (outputs, gradient), (others, other) = one, two
    pairs = zip((*outputs, gradient), (*others, other), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_reference_is_the_textbook():
    logits, ref_logits, targets = problem(dtype=torch.float64)
    used = targets >= 0
    log_probs, ref_log_probs = (x.log_softmax(-1) for x in (logits / 0.7, ref_logits / 0.7))
    pairs = {"forward": (ref_log_probs, log_probs), "reverse": (log_probs, ref_log_probs)}
    for direction, pair in pairs.items():
        out = logprobs(
            logits, targets, temperature=0.7, ref_logits=ref_logits, kl_direction=direction
        )
        expected = (
            log_probs.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1),
            torch.distributions.Categorical(logits=log_probs).entropy(),
            torch.nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1),
        )
        for x, y in zip(out[:3], expected, strict=True):
            torch.testing.assert_close(x, torch.where(used, y, 0))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_reference_gradcheck(direction):
    logits, ref_logits, targets = problem(4, 7, dtype=torch.float64)
    options = {"temperature": 0.7, "kl_direction": direction, "valid_vocab": 6}

    def outputs(x):
        return logprobs(x, targets.clamp(max=5), ref_logits=ref_logits, **options)[:3]

    assert torch.autograd.gradcheck(outputs, [logits.requires_grad_()])


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "row temperatures": {"temperature": torch.linspace(0.5, 2, 13)},
    "reverse": {"kl_direction": "reverse"},
    "padded vocabulary": {"valid_vocab": 901, "kl_direction": "reverse", "temperature": 1.3},
}


def within(errors, eager_errors):
    return all(a <= b + SLACK for a, b in zip(errors, eager_errors, strict=True))


def errors_of(relative_rms, got, truth):
    """Of each output the RMS in nats, and the relative RMS of the gradient."""
    values = [(x - y).square().mean().sqrt() for x, y in zip(got[0], truth[0], strict=True)]
    return [*values, relative_rms(got[1], truth[1])]


@cpu_only
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [1003, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_is_as_close_to_the_truth_as_eager(relative_rms, case, vocab, dtype):
    options = CASES[case]
    logits, ref_logits, targets = problem(v=vocab, dtype=dtype)
    if "valid_vocab" in options:
        targets.clamp_(max=900)
    truth = run(logits.double(), ref_logits.double(), targets, **options)
    eager = run(logits, ref_logits, targets, backend="reference", **options)
    ours = run(logits, ref_logits, targets, backend="cpu", **options)
    assert [x.dtype for x in ours[0]] == [torch.float32] * 3 and ours[1].dtype == dtype
    eager_errors = errors_of(relative_rms, eager, truth)
    assert within(errors_of(relative_rms, ours, truth), eager_errors)
    if case != "plain":
        return
    # The rule can fail: a flipped sign, a dropped mask, a temperature off by 1 %.
    mutants = (
        run(logits, ref_logits, targets, backend="cpu", sign=-1.0),
        run(logits, ref_logits, targets.clamp(min=0), backend="cpu"),
        run(logits, ref_logits, targets, backend="cpu", temperature=1.01),
    )
    for mutant in mutants:
        assert not within(errors_of(relative_rms, mutant, truth)[-1:], eager_errors[-1:])
    for mutant in mutants[1:]:
        assert not within(errors_of(relative_rms, mutant, truth)[:1], eager_errors[:1])


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_vocabulary_on_one_thread_and_on_two(relative_rms, dtype):
    logits, ref_logits, targets = problem(3, 49_157, dtype=dtype)
    truth = run(logits.double(), ref_logits.double(), targets)
    eager = run(logits, ref_logits, targets, backend="reference")
    ours = run(logits, ref_logits, targets, backend="cpu")
    assert within(*(errors_of(relative_rms, x, truth) for x in (ours, eager)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert all_equal(run(logits, ref_logits, targets, backend="cpu"), ours)
    finally:
        torch.set_num_threads(threads)


@cpu_only
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_same_bits_as_linear_logprobs(direction):
    logits, ref_logits, targets = problem()
    weight = torch.eye(1003)  # so that the head's product is the hidden state
    options = {"temperature": torch.linspace(0.5, 2, 13), "kl_direction": direction}
    hidden = logits.clone().requires_grad_()
    linear = linear_logprobs(
        hidden, weight, targets, ref_hidden=ref_logits, ref_weight=weight, backend="cpu", **options
    )
    (gradient,) = torch.autograd.grad(total_of(linear), hidden)
    ours = run(logits, ref_logits, targets, backend="cpu", **options)
    assert all_equal(ours, (linear[:3], gradient))


@cpu_only
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("vocab", [7, 1003])
def test_low_precision_is_read_exactly_and_rounded_once(dtype, vocab):
    logits, ref_logits, targets = problem(v=vocab, dtype=dtype)
    logits[3, 2:5], ref_logits[3, 2:5] = -torch.inf, -torch.inf
    logits[4, :3] = torch.tensor([0.0, -0.0, 6e-8])
    targets[3], targets[4] = 0, 2
    outputs, gradient = run(logits, ref_logits, targets, backend="cpu", temperature=0.7)
    wide = run(logits.float(), ref_logits.float(), targets, backend="cpu", temperature=0.7)
    # The gradient of most columns is subnormal in float16.
    assert all_equal((outputs, gradient), (wide[0], wide[1].to(dtype)))
    mixed = run(logits, ref_logits.float(), targets, backend="cpu", temperature=0.7)
    assert all_equal(mixed, (outputs, gradient))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identities(backend, dtype):
    logits, ref_logits, targets = problem(dtype=dtype)
    rows = torch.full((13,), 0.5)
    tempered = run(logits, ref_logits, targets, temperature=rows, backend=backend)
    for x in (0.5, torch.tensor(0.5)):
        same = run(logits, ref_logits, targets, temperature=x, backend=backend)
        assert all_equal(same, tempered)
    # Doubling is exact: temperature 1/2 on z is 1 on 2z.
    doubled, gradient = run(2 * logits, 2 * ref_logits, targets, backend=backend)
    assert all_equal(tempered, (doubled, 2 * gradient))
    for direction in ("forward", "reverse"):
        out = logprobs(logits, targets, ref_logits=logits, kl_direction=direction, backend=backend)
        assert out.kl.eq(0).all() and (out.logprobs <= 0).all() and (out.entropy >= 0).all()
    assert logprobs(logits, targets, backend=backend).kl is None


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("offset", [-1e4, 1e4, -3e4])
def test_extreme_logits(backend, offset):
    generator = torch.Generator().manual_seed(0)
    # Steps of 1/64, which float32 holds exactly at this size.
    steps = (torch.randn(2, 1003, generator=generator) * 64).round() / 64 * 3
    logits, ref_logits = steps[:1] + offset, steps[1:] - offset
    out, gradient = run(logits, ref_logits, torch.tensor([5]), backend=backend)
    true = run(logits.double(), ref_logits.double(), torch.tensor([5]))
    for x, y in zip(out, true[0], strict=True):
        assert (x - y).abs() < 2e-5
    assert (gradient - true[1]).abs().max() < 2e-5


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_columns_that_do_not_exist(backend, direction):
    logits, ref_logits, targets = problem(v=2100)
    kept = torch.cat((torch.arange(7), torch.arange(2060, 2100)))
    targets %= 7
    gone = torch.ones(2100, dtype=torch.bool).index_fill(0, kept, False)
    options = {"backend": backend, "kl_direction": direction, "temperature": 0.7}
    small = run(logits[:, kept], ref_logits[:, kept], targets, **options)
    masked = [x.masked_fill(gone, -torch.inf) for x in (logits, ref_logits)]
    masked = run(*masked, targets, **options)
    assert masked[1][:, gone].eq(0).all()
    for x, y in zip(masked[0], small[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked[1][:, kept], small[1], rtol=1e-5, atol=1e-6)
    cut = run(logits[:, :900], ref_logits[:, :900], targets, **options)
    padded = [x.index_fill(1, torch.arange(900, 2100), torch.nan) for x in (logits, ref_logits)]
    outputs, gradient = run(*padded, targets, valid_vocab=900, **options)
    assert gradient[:, 900:].eq(0).all()
    assert all_equal((outputs, gradient[:, :900]), cut)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_are_never_read(backend, dtype):
    logits, ref_logits, targets = problem(dtype=dtype)
    clean = run(logits, ref_logits, targets, backend=backend)
    ignored = targets == -100
    for x in (logits, ref_logits):
        x[ignored] = torch.nan
    outputs, gradient = run(logits, ref_logits, targets, backend=backend)
    assert all_equal((outputs, gradient), clean)
    assert all(x[ignored].eq(0).all() for x in (*outputs, gradient))
    targets[ignored] = -1
    assert all_equal(run(logits, ref_logits, targets, ignore_index=-1, backend=backend), clean)


@cpu_only
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_without_a_coefficient_are_not_read_backward(inplace):
    leaf = problem()[0].requires_grad_()
    logits, targets = leaf.clone(), torch.arange(13)
    out = logprobs(logits, targets, inplace_backward=inplace, backend="cpu")
    logits.detach().data[::2] = torch.nan
    (gradient,) = torch.autograd.grad(out.logprobs[1::2].sum(), logits)
    assert gradient[::2].eq(0).all() and not gradient[::2].signbit().any()
    (alone,) = torch.autograd.grad(logprobs(leaf, targets).logprobs[1::2].sum(), leaf)
    assert torch.equal(gradient, alone)


@pytest.mark.parametrize("backend", ON_CPU)
def test_shapes_layouts_and_empty_input(backend):
    logits, ref_logits, targets = problem(12)
    flat = run(logits, ref_logits, targets, backend=backend)
    options = {"backend": backend, "temperature": torch.ones(3, 4)}
    (x, y), t = (z.reshape(3, 4, -1) for z in (logits, ref_logits)), targets.reshape(3, 4)
    wide = torch.full((3, 5, 1010), torch.nan)
    wide[:, :4, :1003] = x
    spread = torch.full((3, 4, 2006), torch.nan)
    spread[..., ::2] = x
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (x, wide[:, :4, :1003], spread[..., ::2], turned):
        outputs, gradient = run(given, y, t, **options)
        assert outputs[0].shape == (3, 4) and gradient.shape == (3, 4, 1003)
        flattened = [z.reshape(12) for z in outputs], gradient.reshape(12, 1003)
        assert all_equal(flattened, flat)
    one, rest = logits[:1], (ref_logits[:3], targets[:3])
    repeated = run(one.expand(3, -1), *rest, backend=backend)
    assert all_equal(repeated, run(one.repeat(3, 1), *rest, backend=backend))
    for n in (0, 1):
        outputs, gradient = run(logits[:n], ref_logits[:n], targets[:n], backend=backend)
        assert gradient.shape == (n, 1003) and outputs[0].tolist() == flat[0][0][:n].tolist()
    assert logprobs(logits[0], targets[0], backend=backend).logprobs == flat[0][0][0]


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "valid_vocab": 1000}])
def test_inplace_backward_makes_no_second_tensor(dtype, options):
    logits, ref_logits, targets = problem(24, dtype=dtype)
    logits, ref_logits = (x.reshape(4, 6, -1) for x in (logits, ref_logits))
    targets = targets.clamp(max=999).reshape(4, 6)[:, :-1]
    values, expected = run(logits[:, :-1], ref_logits[:, :-1], targets, backend="cpu", **options)
    hidden = logits.clone().requires_grad_()
    given, tokens = (1 * hidden)[:, :-1], {"ref_logits": ref_logits[:, :-1], **options}
    before = given.detach().clone()
    budget = 1003 * given.element_size()
    with forbid_vocab_tensors(budget, vocab_sizes={1003}):
        out = logprobs(given, targets, inplace_backward=True, backend="cpu", **tokens)
        assert torch.equal(given, before)
        (gradient,) = torch.autograd.grad(total_of(out), given)
    assert gradient.data_ptr() == given.data_ptr() and gradient.stride() == given.stride()
    assert all_equal((values, expected), ([x.detach() for x in out[:3]], gradient))
    given = 1 * hidden[:, :-1]
    total_of(logprobs(given, targets, inplace_backward=True, **tokens)).backward()
    assert torch.equal(hidden.grad[:, :-1], expected)
    # The budget can fail: without the permission the gradient is a tensor of its own.
    total = total_of(logprobs(given := 1 * hidden[:, :-1], targets, backend="cpu", **tokens))
    with pytest.raises(VocabTensorError), forbid_vocab_tensors(budget, vocab_sizes={1003}):
        torch.autograd.grad(total, given)


@pytest.mark.parametrize("backend", ON_CPU)
def test_inplace_backward_is_refused_where_the_logits_are_needed(backend):
    logits, ref_logits, targets = problem()
    options = {"inplace_backward": True, "backend": backend}
    leaf = logits.clone().requires_grad_()
    for given in (leaf, leaf[:, :1000], leaf.view(1, 13, 1003)[0]):
        with pytest.raises(ValueError, match=r"leaf.*\[13, "):
            logprobs(given, targets.clamp(max=999), **options)
    with pytest.raises(ValueError, match=r"memory of their own.*\[13, 1003\]"):
        logprobs((1 * leaf)[:1].expand(13, -1), targets, **options)
    both = 1 * leaf
    with pytest.raises(ValueError, match=r"share memory.*ref_logits \[13, 1003\]"):
        logprobs(both, targets, ref_logits=both.detach(), **options)
    halves = torch.cat((both, ref_logits))
    out = logprobs(halves[:13], targets, ref_logits=halves[13:], **options)
    _, expected = run(logits, ref_logits, targets, backend=backend)
    assert torch.equal(torch.autograd.grad(total_of(out), leaf)[0], expected)


@cpu_only
def test_inplace_backward_says_so_where_the_logits_are_read_later():
    logits, _, targets = problem()
    leaf = logits.requires_grad_()
    given = 1 * leaf
    out = logprobs(given, targets, inplace_backward=True, backend="cpu")
    loss = out.logprobs.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already called"):
        loss.backward()
    # tanh keeps its result, which is the logits, for its own backward; square keeps its input.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs(leaf.tanh(), targets, inplace_backward=True).logprobs.sum().backward()
    given = 1 * leaf
    square = given.square().sum()
    logprobs(given, targets, inplace_backward=True).logprobs.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
