"""Triton's rows of logits against float64 truth, no worse than eager torch in the same dtype.

Blocks of 32 columns in parts of 64, so that few columns make several of each: 70 end in a ragged
block of a ragged part, 96 fill theirs and are aligned. Every output is NaN before its launch.
"""

import subprocess
import sys

import pytest
import torch

from fastrlhf_kernels import logprobs

pytest.importorskip("triton")

from fastrlhf_kernels import _triton_logits, _triton_rows, _triton_rows_gradient
from fastrlhf_kernels._triton_rows import logit_statistics, row_statistics
from fastrlhf_kernels._triton_rows_gradient import logit_gradient, row_gradient

pytestmark = [
    pytest.mark.interpret,
    # −inf less −inf, which is then replaced.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLACK = 5e-7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, request):
    if "real_blocks" in request.fixturenames:
        return
    monkeypatch.setattr(_triton_logits, "PART_COLUMNS", 64)
    for module in (_triton_rows, _triton_rows_gradient):
        monkeypatch.setattr(module, "block_columns", lambda *_: 32)


@pytest.fixture
def real_blocks():
    return None


class Problem:
    """Logits, a reference's, targets, temperatures and coefficients of each row."""

    def __init__(self, device, n=4, v=70, dtype=torch.float32, has_reference=True):
        generator = torch.Generator().manual_seed(n + v)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.logits = (3 * normal(n, v)).to(device, dtype)
        self.ref_logits = (self.logits.cpu() + 0.3 * normal(n, v)).to(device, dtype)
        if not has_reference:
            self.ref_logits = None
        self.targets = torch.randint(0, v - 9, (n,), generator=generator).to(device)
        self.used = torch.ones(n, dtype=torch.bool, device=device)
        self.temperature = torch.linspace(0.5, 2, n).to(device)
        self.coefficients = normal(n, 3).to(device)
        if not has_reference:
            self.coefficients[:, 2] = 0


def nan(*shape, like, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype, device=like.device)


def run(p, *, columns=None, reverse=False, inplace=False):
    """Statistics [N, 3] and gradient of the Triton kernels."""
    columns = columns or p.logits.shape[-1]
    table = nan(p.targets.numel(), 8, like=p.logits)
    logit_statistics(
        p.logits, p.ref_logits, p.targets.reshape(-1), p.used, p.temperature, table,
        columns=columns, reverse=reverse,
    )  # fmt: skip
    gradient = p.logits if inplace else torch.full_like(p.logits, torch.nan)
    logit_gradient(
        p.logits, p.ref_logits, p.targets.reshape(-1), p.temperature, table, p.coefficients,
        gradient, columns=columns, reverse=reverse,
    )  # fmt: skip
    return table[:, 4:7], gradient


def eager(p, dtype, *, columns=None, reverse=False):
    """The same of the reference backend, in `dtype`."""
    leaf = p.logits.detach().to(dtype).requires_grad_()
    ref_logits = None if p.ref_logits is None else p.ref_logits.to(dtype)
    temperature = p.temperature.to(torch.promote_types(dtype, torch.float32))
    out = logprobs(
        leaf, p.targets, temperature=temperature, ref_logits=ref_logits, valid_vocab=columns,
        kl_direction="reverse" if reverse else "forward", backend="reference",
    )  # fmt: skip
    kl = torch.zeros_like(out.entropy) if out.kl is None else out.kl
    statistics = torch.stack((out.logprobs, out.entropy, kl), -1)
    (gradient,) = torch.autograd.grad((p.coefficients * statistics).sum(), leaf)
    return statistics.detach(), gradient


def errors(relative_rms, got, truth):
    values = (got[0].double() - truth[0]).square().mean(0).sqrt()
    return [*values.tolist(), relative_rms(got[1], truth[1])]


def within(ours, eagers):
    return all(x <= y + SLACK for x, y in zip(ours, eagers, strict=True))


CASES = {
    "alone": ({"has_reference": False}, {}),
    "forward": ({}, {"columns": 61}),
    "reverse": ({"v": 96}, {"reverse": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_close_to_the_truth_as_eager(device, relative_rms, dtype, case):
    made, options = CASES[case]
    p = Problem(device, dtype=dtype, **made)
    truth, eagers = eager(p, torch.float64, **options), eager(p, dtype, **options)
    eager_errors = errors(relative_rms, eagers, truth)
    before = p.logits.clone()
    ours = run(p, **options)
    assert ours[1].dtype == dtype and torch.equal(p.logits, before)
    assert within(errors(relative_rms, ours, truth), eager_errors)
    if "columns" in options:
        assert ours[1][:, options["columns"] :].eq(0).all()
    if (dtype, case) != (torch.float32, "reverse"):
        return
    # The rule can fail: a temperature off by 0.1 %, a flipped sign, the other direction.
    p.temperature *= 1.001
    assert not within(errors(relative_rms, run(p, **options), truth), eager_errors)
    p.temperature /= 1.001
    forward = run(p)
    assert not within(errors(relative_rms, forward, truth)[2:3], eager_errors[2:3])
    p.coefficients[:, 1] *= -1
    flipped = errors(relative_rms, run(p, **options), truth)
    assert within(flipped[:3], eager_errors[:3]) and not within(flipped[3:], eager_errors[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_and_any_strides_give_the_same_bits(device, dtype):
    p = Problem(device, dtype=dtype)
    statistics, gradient = run(p)
    wide = torch.full((2, 3, 75), torch.nan, dtype=dtype, device=device)
    wide[:, :2, :70] = p.logits.reshape(2, 2, 70)
    turned = p.logits.reshape(2, 2, 70).transpose(0, 1).contiguous().transpose(0, 1)
    p.ref_logits = p.ref_logits.reshape(2, 2, 70)
    for given in (wide[:, :2, :70], turned):
        p.logits = given
        got, own = run(p, inplace=True)
        assert torch.equal(got, statistics) and torch.equal(own.reshape(4, 70), gradient)
    rest = torch.ones(2, 3, 75, dtype=torch.bool, device=device)
    rest[:, :2, :70] = False
    assert wide[rest].isnan().all()


def test_a_row_depends_on_nothing_but_itself(device):
    p = Problem(device)
    first, again = run(p), run(p)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for name in ("logits", "ref_logits", "targets", "used", "temperature", "coefficients"):
        setattr(p, name, getattr(p, name)[2:3])
    statistics, gradient = run(p)
    assert torch.equal(statistics, first[0][2:3]) and torch.equal(gradient, first[1][2:3])


def test_rows_that_are_not_used_are_not_read(device):
    p = Problem(device)
    clean, gradient = run(p)
    p.used[1], p.coefficients[1], p.targets[1] = False, 0, -100
    p.logits[1], p.ref_logits[1] = torch.nan, torch.nan
    table, got = run(p)
    kept = torch.tensor([0, 2, 3], device=device)
    assert torch.equal(table[kept], clean[kept]) and torch.equal(got[kept], gradient[kept])
    assert table[1].isnan().all() and got[1].eq(0).all() and not got[1].signbit().any()
    # Without a coefficient of the KL the reference is not read in the backward.
    p = Problem(device)
    p.coefficients[:, 2] = 0
    table = nan(4, 8, like=p.logits)
    logit_statistics(
        p.logits, p.ref_logits, p.targets, p.used, p.temperature, table, columns=70, reverse=True
    )
    for reverse in (False, True):
        got = torch.full_like(p.logits, torch.nan)
        logit_gradient(
            p.logits, p.ref_logits * torch.nan, p.targets, p.temperature, table, p.coefficients,
            got, columns=70, reverse=reverse,
        )  # fmt: skip
        assert not got.isnan().any()


@pytest.mark.parametrize("reverse", [False, True])
def test_extreme_rows(device, reverse):
    p = Problem(device)
    # Steps of 1/64, which float32 holds exactly at 1e4. The tempered gap is what is rounded.
    p.logits, p.ref_logits = ((x * 64).round() / 64 for x in (p.logits, p.ref_logits))
    p.logits += torch.tensor([-1e4, 1e4, -50, 0], device=device)[:, None]
    p.ref_logits -= torch.tensor([1e4, 1e4, -50, 0], device=device)[:, None]
    for x in (p.logits, p.ref_logits):
        x[3, 3:50] = -torch.inf  # a whole block among them
    p.targets[3] = 1
    statistics, gradient = run(p, reverse=reverse)
    truth, true_gradient = eager(p, torch.float64, reverse=reverse)
    assert (statistics - truth).abs().max() < 5e-6
    assert (gradient - true_gradient).abs().max() < 5e-6
    assert gradient[3, 3:50].eq(0).all()
    # A policy is no distance from itself, whatever its logits.
    p.ref_logits = p.logits.clone()
    statistics, _ = run(p, reverse=reverse)
    assert statistics[:, 2].eq(0).all()
    assert (statistics[:, 0] <= 0).all() and (statistics[:, 1] >= 0).all()
    p.logits[0, 5] = torch.nan
    assert run(p, reverse=reverse)[0][0].isnan().all()


HEADS = {"bias": (True, None, 1.0), "cap": (False, 2.5, 0.6), "all": (True, 2.5, 0.6)}


@pytest.mark.parametrize("head", HEADS)
def test_rows_of_a_head(device, relative_rms, head):
    has_bias, softcap, scale = HEADS[head]
    p = Problem(device)
    biases = [x.to(device) for x in torch.randn(2, 70, generator=torch.Generator().manual_seed(1))]
    biases = biases if has_bias else [None, None]

    def transformed(x, bias):
        x = (x if bias is None else x + bias) * scale
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    def reference(dtype):
        raw, ref_raw = p.logits.to(dtype).requires_grad_(), p.ref_logits.to(dtype)
        given = [None if x is None else x.to(dtype) for x in biases]
        capped = Problem(device)
        capped.logits, capped.ref_logits = (
            transformed(raw, given[0]),
            transformed(ref_raw, given[1]),
        )
        statistics, gradient = eager(capped, dtype)
        return statistics, torch.autograd.grad(capped.logits, raw, gradient)[0]

    options = {"logit_scale": scale, "softcap": softcap, "reverse": False}
    table = nan(4, 8, like=p.logits)
    before = p.logits.clone()
    row_statistics(p.logits, p.ref_logits, p.targets, *biases, p.temperature, table, **options)
    assert torch.equal(p.logits, before)
    tokens = (p.targets, *biases, p.temperature, table, p.coefficients)
    truth, eagers = reference(torch.float64), reference(torch.float32)
    gradient = torch.full_like(p.logits, torch.nan)
    own = torch.arange(4, device=device)
    row_gradient(p.logits, p.ref_logits, *tokens, own, gradient, **options)
    ours = errors(relative_rms, (table[:, 4:7], gradient), truth)
    assert within(ours, errors(relative_rms, eagers, truth))
    # Rows move to their slots, rounded once; a row without one leaves no trace.
    slots = torch.tensor([1, -1, 0, 2], device=device)
    moved = nan(4, 70, like=p.logits, dtype=torch.bfloat16)
    row_gradient(p.logits, p.ref_logits, *tokens, slots, moved, **options)
    assert torch.equal(moved[:3], gradient[[2, 0, 3]].bfloat16()) and moved[3].isnan().all()
    with pytest.raises(AssertionError):
        row_gradient(p.logits, p.ref_logits, *tokens, slots, p.logits, **options)


def test_a_head_without_options_is_given_logits(device):
    p = Problem(device, has_reference=False)
    statistics, gradient = run(p)
    table, got = nan(4, 8, like=p.logits), torch.full_like(p.logits, torch.nan)
    options = {"logit_scale": 1.0, "softcap": None, "reverse": False}
    row_statistics(p.logits, None, p.targets, None, None, p.temperature, table, **options)
    row_gradient(
        p.logits, None, p.targets, None, None, p.temperature, table, p.coefficients,
        torch.arange(4, device=device), got, **options,
    )  # fmt: skip
    assert torch.equal(table[:, 4:7], statistics) and torch.equal(got, gradient)
    assert table[:, [2, 3, 6, 7]].eq(0).all()
    nothing = Problem(device, n=0)
    assert run(nothing)[1].shape == (0, 70)


@pytest.mark.parametrize("v", [5003, 16_400])
def test_real_blocks(device, relative_rms, real_blocks, v):
    p = Problem(device, n=2, v=v, dtype=torch.bfloat16)
    truth, eagers = eager(p, torch.float64), eager(p, torch.bfloat16)
    assert within(*(errors(relative_rms, x, truth) for x in (run(p), eagers)))


def test_a_target_that_is_not_there_has_no_log_probability(device):
    # On a GPU nobody looks at the targets first: what lies beside a row is not its logit.
    p = Problem(device)
    biases = [torch.zeros(70, device=device) for _ in range(2)]
    given = (p.temperature, nan(4, 8, like=p.logits))
    options = {"logit_scale": 1.0, "softcap": None, "reverse": False}
    expected, _ = run(p)
    for columns in (70, 61):
        p.targets[1:3] = torch.tensor([-3, columns + 1])
        given[1].fill_(0)
        if columns == 70:
            row_statistics(p.logits, p.ref_logits, p.targets, *biases, *given, **options)
            assert torch.equal(given[1][[0, 3], 4:7], expected[[0, 3]])
        else:
            logit_statistics(
                p.logits, p.ref_logits, p.targets, p.used, *given, columns=columns, reverse=False
            )
        assert given[1][1:3][:, [4, 7]].isnan().all() and not given[1][:, :4].isnan().any()
        assert not given[1][[0, 3]].isnan().any() and not given[1][:, 5:7].isnan().any()


FAR = """
import sys, torch
sys.path.insert(0, {tests!r})
import conftest
from test_triton_rows import Problem, run
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
p = Problem(device, n=2, has_reference=False, dtype=torch.bfloat16)
near, gradient = run(p)
# Memory that is never touched is never there.
storage = torch.empty(2**31 + 1000, dtype=torch.bfloat16, device=device)
far = storage.as_strided((2, 70), (2**31 + 100, 1))
far.copy_(p.logits)
p.logits = far
statistics, _ = run(p, inplace=True)
assert torch.equal(statistics, near) and torch.equal(far, gradient)
"""


def test_offsets_beyond_2_to_the_31():
    # A bad address would kill the process: it is another one.
    code = FAR.format(tests=str(__import__("pathlib").Path(__file__).parent))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_variants_name_every_argument():
    for module in (_triton_rows, _triton_rows_gradient):
        listed = list(module.variants("sm_80"))
        assert len({(x.name, x.config, x.dtype) for x in listed}) == len(listed)
        for x in listed:
            assert list(x.signature) == list(x.kernel.arg_names)
            chosen = {name for name, kind in x.signature.items() if kind == "constexpr"}
            assert chosen == set(x.constexprs)
