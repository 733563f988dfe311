"""The head's Triton kernels: statistics and gradients against float64 truth.

The tolerance is eager float32's own error plus a slack; mutations show that it can fail. Sizes:
1003 is no multiple of a tile, 150 rows are two tiles of rows, D = 33 is no multiple of a step.
Under the interpreter on a CPU, on the device where there is one.
"""

import subprocess
import sys

import pytest
import torch

from fastrlhf_kernels import _triton, _triton_head, _triton_head_gradient, reference
from fastrlhf_kernels._head import HeadInputs, HeadOptions
from fastrlhf_kernels._records import EXTRA_STATS
from fastrlhf_kernels._triton_head import head_statistics
from fastrlhf_kernels._triton_head_gradient import float32_product, head_gradients

pytestmark = pytest.mark.interpret
SLACK = 5e-7
PLAIN = HeadOptions(1.0, None, "forward", 1003, 2**20)
SHARED, SEPARATE = ("ref_hidden",), ("ref_hidden", "ref_weight", "ref_bias")
CASES = {
    "no bias": ((), {}),
    "bias and soft cap": (("bias",), {"softcap": 5.0, "logit_scale": 0.5}),
    "shared head": (("bias", *SHARED), {}),
    "shared head, reverse": (SHARED, {"kl_direction": "reverse"}),
    "reference": (("bias", *SEPARATE), {"workspace_bytes": 2**17}),
    "padded vocabulary": (("bias", *SEPARATE), {"valid_vocab": 700, "softcap": 9.0}),
    "padded, reverse": (("bias", *SEPARATE), {"valid_vocab": 700, "kl_direction": "reverse"}),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the launchers allocate holds NaN, so that an unwritten element shows."""

    def filled(allocate):
        def empty(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.dtype.is_floating_point else x

        return empty

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.fixture
def head(head_problem, device):
    """HeadInputs of a problem, with the named optional parts, targets below `vocab`."""

    def make(parts, n=13, d=16, v=1003, *, vocab=None, dtype=torch.float32, **options):
        p = head_problem(n, d, v, **options)
        given = {name: getattr(p, name) for name in ("hidden", "weight", *parts)}
        tensors = {name: x.to(device, dtype) for name, x in given.items()}
        targets = p.targets.clamp(max=(vocab or v) - 1).to(device)
        temperature = torch.linspace(0.5, 2, n, device=device)
        empty = dict.fromkeys(HeadInputs._fields) | tensors
        return HeadInputs(**(empty | {"targets": targets, "temperature": temperature}))

    return make


def eager(inputs, rows, options, coefficients, dtype=torch.float64):
    """Statistics and gradients by autograd through the reference."""

    def raised(x):
        return None if x is None else x.detach().to(dtype).requires_grad_()

    hidden, weight, bias = (raised(x) for x in inputs[:3])
    ref_hidden, ref_weight, ref_bias = (None if x is None else x.to(dtype) for x in inputs[5:])
    if ref_hidden is not None and ref_weight is None:
        ref_weight, ref_bias = weight.detach(), None if bias is None else bias.detach()
    out, ref_logprobs = reference.linear_statistics(
        hidden[rows], weight, bias, inputs.targets[rows], inputs.temperature[rows].to(dtype),
        None if ref_hidden is None else ref_hidden[rows], ref_weight, ref_bias,
        logit_scale=options.logit_scale, softcap=options.softcap, valid_vocab=options.valid_vocab,
        kl_direction=options.kl_direction, stats=EXTRA_STATS,
    )  # fmt: skip
    a, b, c = coefficients.to(dtype).unbind(1)
    loss = (a * out.logprobs + b * out.entropy).sum()
    statistics = [out.logprobs, out.entropy, *(x.to(dtype) for x in out.extra.values())]
    if out.kl is not None:
        loss = loss + (c * out.kl).sum()
        statistics += [out.kl, ref_logprobs]
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    return statistics, torch.autograd.grad(loss, leaves)


def triton(inputs, rows, options, coefficients, needs=(True, True, True)):
    """As `eager`, by the kernels."""
    table, extra = head_statistics(inputs, rows, options, extra=True)
    gradients = head_gradients(inputs, rows, options, table, coefficients, needs)
    statistics = [table[:, 4], table[:, 5], *extra.unbind(1)]
    if inputs.ref_hidden is not None:
        statistics += [table[:, 6], table[:, 7]]
    return statistics, [x for x in gradients if x is not None]


def random_coefficients(rows):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows.numel(), 3, generator=generator).to(rows.device)


def within(relative_rms, ours, plain, truth):
    """Per tensor: no worse than eager float32, plus the slack."""
    return [
        relative_rms(a, t) <= relative_rms(b, t) + SLACK
        for group in zip(ours, plain, truth, strict=True)
        for a, b, t in zip(*group, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_as_close_to_the_truth_as_eager_float32(head, relative_rms, device, case):
    parts, changes = CASES[case]
    options = PLAIN._replace(**changes)
    inputs = head(parts, vocab=options.valid_vocab)
    rows = torch.tensor([12, 0, 3, 4, 5, 9], device=device)
    coefficients = random_coefficients(rows)
    truth = eager(inputs, rows, options, coefficients)
    plain = eager(inputs, rows, options, coefficients, torch.float32)
    ours = triton(inputs, rows, options, coefficients)
    assert all(within(relative_rms, ours, plain, truth))
    if case != "padded, reverse":
        return
    # The rule can fail: a flipped sign, a wrong direction, a mask that lets a padded column in.
    flipped = coefficients * torch.tensor([1, 1, -1], device=device)
    assert not any(within(relative_rms, triton(inputs, rows, options, flipped), plain, truth)[-3:])
    for change in ({"kl_direction": "forward"}, {"valid_vocab": 701}):
        mutant = triton(inputs, rows, options._replace(**change), coefficients)
        assert not all(within(relative_rms, mutant, plain, truth))


def test_operands_of_several_dtypes_and_strides_are_raised_slice_by_slice(
    head, relative_rms, device
):
    options = PLAIN._replace(workspace_bytes=256 * 16 * 4 * 4, valid_vocab=700)
    inputs = head(("bias", *SEPARATE), v=700)
    mixed = inputs._replace(
        weight=inputs.weight.bfloat16(),
        hidden=inputs.hidden.t().contiguous().t(),
        ref_weight=inputs.ref_weight.half(),
    )
    rows = torch.arange(13, device=device)
    coefficients = random_coefficients(rows)
    (statistics, gradients) = triton(mixed, rows, options, coefficients)
    assert [x.dtype for x in gradients] == [torch.float32, torch.bfloat16, torch.float32]
    truth = eager(mixed, rows, options, coefficients)
    plain = eager(mixed, rows, options, coefficients, torch.float32)
    plain[1][1].copy_(plain[1][1].bfloat16())
    assert all(within(relative_rms, (statistics, gradients), plain, truth))


def test_sixteen_bit_operands_have_float32_logits(head, relative_rms, device):
    inputs = head(("bias", *SEPARATE), d=64, v=300, dtype=torch.bfloat16, scale=1.4)
    inputs = inputs._replace(temperature=torch.ones_like(inputs.temperature))
    options = PLAIN._replace(valid_vocab=300)
    rows = torch.arange(13, device=device)
    coefficients = random_coefficients(rows)
    largest = (inputs.hidden.float() @ inputs.weight.float().t()).abs().max()
    assert 30 < largest < 60
    truth = eager(inputs, rows, options, coefficients)
    (logprobs, *_), gradients = triton(inputs, rows, options, coefficients)
    assert (logprobs - truth[0][0]).abs().max() <= 2e-5
    rounded = (inputs.hidden @ inputs.weight.t() + inputs.bias).double().log_softmax(-1)
    picked = rounded.gather(-1, inputs.targets[:, None]).squeeze(-1)
    assert (picked - truth[0][0]).abs().max() > 2e-2
    # The gradient of the logits is rounded to the operands' dtype, as autograd's is.
    for got, true in zip(gradients, truth[1], strict=True):
        assert got.dtype == torch.bfloat16 and relative_rms(got, true) < 3e-3


def test_the_bits_of_a_row_are_its_own(head, device):
    inputs = head(("bias", *SHARED), n=150, v=300)
    options = PLAIN._replace(valid_vocab=300)
    rows = torch.arange(150, device=device)
    table, extra = head_statistics(inputs, rows, options, extra=True)
    again, _ = head_statistics(inputs, rows, options, extra=True)
    assert torch.equal(table, again)
    # Fewer rows, in another order, and one tile of rows at a time.
    some = torch.tensor([149, 3, 77, 0, 128], device=device)
    for chosen, size in ((some, 2**20), (rows.flip(0), 1)):
        got, more = head_statistics(
            inputs, chosen, options._replace(workspace_bytes=size), extra=True
        )
        assert torch.equal(got, table[chosen]) and torch.equal(more, extra[chosen])


def test_gradients_repeat_and_other_rows_are_not_read(head, device):
    inputs = head(("bias",), v=300)
    rows = torch.tensor([5, 2, 11], device=device)
    others = torch.ones(13, dtype=torch.bool, device=device).index_fill(0, rows, False)
    inputs.hidden[others] = torch.nan
    inputs.targets[others] = -100
    options = PLAIN._replace(valid_vocab=300, workspace_bytes=1)
    coefficients = random_coefficients(rows)
    first, again = (triton(inputs, rows, options, coefficients)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    hidden, weight, _ = first
    assert hidden[others].eq(0).all() and hidden[rows].ne(0).all() and weight.isfinite().all()
    table, _ = head_statistics(inputs, rows, options)
    frozen = head_gradients(inputs, rows, options, table, coefficients, (True, False, False))
    assert torch.equal(frozen[0], hidden) and frozen[1:] == (None, None)


def test_edges(head, device):
    options = PLAIN._replace(valid_vocab=300)
    inputs = head(("bias", *SEPARATE), v=300)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    table, extra = head_statistics(inputs, nothing, options, extra=True)
    assert table.shape == (0, 8) and extra.shape == (0, 3)
    gradients = head_gradients(inputs, nothing, options, table, table[:, :3], (True, True, True))
    assert all(
        x.eq(0).all() and x.shape == y.shape for x, y in zip(gradients, inputs, strict=False)
    )
    one = torch.tensor([4], device=device)
    # A vocabulary of one token: log-probability, entropy and gradient are exactly 0.
    table, _ = head_statistics(inputs, one, options._replace(valid_vocab=1))
    alone = inputs._replace(targets=torch.zeros_like(inputs.targets))
    assert head_statistics(alone, one, options._replace(valid_vocab=1))[0][0, 4:].eq(0).all()
    assert table[0, 4].isnan()  # its target is not in that vocabulary
    # The policy is its own reference.
    same = inputs._replace(ref_hidden=inputs.hidden, ref_weight=inputs.weight, ref_bias=inputs.bias)
    table, _ = head_statistics(same, one, options)
    assert table[0, 6] == 0 and table[0, 4] == table[0, 7]


@pytest.mark.parametrize("d", [1, 33])
def test_extreme_logits(head, relative_rms, device, d):
    """Logits of ±1e4, tokens that a bias of −∞ forbids, and rows where all logits are low."""
    inputs = head(("bias", *SHARED), d=d, v=300)
    scale = 1e4 / (inputs.hidden @ inputs.weight.t()).abs().amax()
    options = PLAIN._replace(valid_vocab=300, logit_scale=float(scale))
    inputs.bias[:256] = -torch.inf
    inputs.bias[256:] = -3e4 / scale
    inputs.targets.fill_(290)
    rows = torch.arange(13, device=device)
    coefficients = random_coefficients(rows)
    truth = eager(inputs, rows, options, coefficients)
    plain = eager(inputs, rows, options, coefficients, torch.float32)
    ours = triton(inputs, rows, options, coefficients)
    assert ours[0][2].eq(-torch.inf).all()  # the mean of the logits
    # One unit in the last place of the largest logit, 8e4, is 8e-3: what a rounding in another
    # order may change, beside the error that eager float32 has.
    for i, (a, b, t) in enumerate(zip(ours[0], plain[0], truth[0], strict=True)):
        assert i == 2 or (a - t).abs().max() <= (b - t).abs().max() + 8e-3
    for a, b, t in zip(ours[1], plain[1], truth[1], strict=True):
        assert a.isfinite().all() and relative_rms(a, t) <= 2 * relative_rms(b, t) + 1e-3


def test_nan_stays_visible(head, device):
    inputs = head(("bias", *SHARED), v=300)
    inputs.weight[7, 0] = torch.nan
    rows = torch.arange(13, device=device)
    table, _ = head_statistics(inputs, rows, PLAIN._replace(valid_vocab=300))
    assert table[:, 4:].isnan().all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_divergence_without_a_coefficient_may_be_infinite(head, device, direction):
    inputs = head(("bias", *SEPARATE), v=300)
    # The reference, or in reverse the policy, forbids a token that the other allows; of a third
    # kind of row the reference knows nothing at all.
    (inputs.ref_bias if direction == "forward" else inputs.bias)[7] = -torch.inf
    inputs.targets.fill_(290)
    inputs.ref_hidden[4] = torch.nan
    options = PLAIN._replace(valid_vocab=300, kl_direction=direction)
    rows = torch.tensor([4, 2, 0], device=device)
    coefficients = random_coefficients(rows)
    coefficients[:, 2] = 0
    table, _ = head_statistics(inputs, rows, options)
    assert table[1:, 6].isposinf().all() and table[0, 6].isnan()
    needs = (True, True, True)
    got = head_gradients(inputs, rows, options, table, coefficients, needs)
    alone = inputs._replace(ref_hidden=None, ref_weight=None, ref_bias=None)
    expected = head_gradients(alone, rows, options, table, coefficients, needs)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)  # a NaN is close to nothing


FAR = """
import torch
from fastrlhf_kernels._head import HeadInputs, HeadOptions
from fastrlhf_kernels._triton_head import head_statistics
from fastrlhf_kernels._triton_head_gradient import head_gradients

n, d, v, apart = 2**27 + 2, 16, 160, 2**24
assert n * d > 2**31 and v * apart > 2**31
generator = torch.Generator().manual_seed(0)
near = torch.randn(2, d, generator=generator)
hidden, temperature = torch.empty(n, d), torch.empty(n)
targets = torch.empty(n, dtype=torch.int64)
rows = torch.tensor([n - 1, 0])
hidden[rows], temperature[rows], targets[rows] = near, torch.ones(2), torch.tensor([159, 3])
weight = torch.empty(v * apart, dtype=torch.float32).as_strided((v, d), (apart, 1))
weight.copy_(torch.randn(v, d, generator=generator))
options = HeadOptions(1.0, None, "forward", v, 2**20)
rest = (None, None, None)
far = HeadInputs(hidden, weight, None, targets, temperature, *rest)
close = HeadInputs(near, weight.contiguous(), None, targets[rows], torch.ones(2), *rest)
coefficients = torch.ones(2, 3)
results = []
for inputs, chosen in ((far, rows), (close, torch.arange(2))):
    table, _ = head_statistics(inputs, chosen, options)
    gradients = head_gradients(inputs, chosen, options, table, coefficients, (False, True, False))
    results.append((table, gradients[1]))
assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is not mapped lazily on a GPU")
def test_offsets_beyond_32_bits():
    done = subprocess.run([sys.executable, "-c", FAR], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_product(device, dtype):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(24, 24, generator=generator).to(device, dtype) for _ in range(2))
    expected = a.float() @ b.float()
    out = float32_product(a, b)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    assert float32_product(a.t(), b, out=out) is out
    torch.testing.assert_close(out, a.float().t() @ b.float())
    float32_product(a, b, out=out, accumulate=True)
    torch.testing.assert_close(out, a.float().t() @ b.float() + expected)
    float32_product(a, b, out=out, alpha=0.5)
    torch.testing.assert_close(out, 0.5 * expected)
    float32_product(a, b, out=out, accumulate=True, alpha=-0.5)
    assert out.eq(0).all()


@pytest.mark.parametrize("target", _triton.TARGETS)
def test_variants_name_every_argument(target):
    for module in (_triton_head, _triton_head_gradient):
        listed = list(module.variants(target))
        assert len({(x.name, x.config, x.dtype) for x in listed}) == len(listed)
        for x in listed:
            assert set(x.signature) | set(x.constexprs) == set(x.kernel.arg_names)
            assert not set(x.signature) & set(x.constexprs) and set(x.divisible) <= set(x.signature)
            area = x.constexprs.get("BLOCK_M", 0) * x.constexprs.get("BLOCK_N", 0)
            assert not x.matrix or area >= 128 * 64
