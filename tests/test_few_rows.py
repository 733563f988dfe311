"""Few rows are multiplied as exactly as by torch, and every element is written."""

import pytest
import torch
import torch.nn.functional as F

from fastrlhf_kernels import _cpu
from fastrlhf_kernels.few_rows import (
    LEAST_DEPTH,
    LEAST_ROWS,
    few_rows_linear,
    few_rows_lora,
    fits_few_rows,
)

needs_kernel = pytest.mark.skipif(
    not _cpu.multiplies_few_rows(torch.zeros(1, 1), torch.zeros(1, 1)),
    reason="this CPU has no AVX-512, or the package was built without a compiler",
)
# Two steps of float32, of the sum of |terms|: 128 of them join one sum, in vendors' products fewer.
SLACK = 2 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nobody wrote to is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def problem(rows, depth, columns, bias=True):
    generator = torch.Generator().manual_seed(rows * 10_007 + depth * 101 + columns)
    left, right = (torch.randn(n, depth, generator=generator) for n in (rows, columns))
    return left, right, torch.randn(columns, generator=generator) if bias else None


def assert_as_exact_as_torch(ours, left, right, bias):
    """The worst error, as a share of the sum of |terms|, is torch's own and SLACK at most."""
    terms = [x if x is None else x.double() for x in (left, right, bias)]
    truth = F.linear(*terms)
    scale = F.linear(*(x if x is None else x.abs() for x in terms))
    errors = [((x - truth).abs() / scale).max() for x in (ours, F.linear(left, right, bias))]
    assert ours.shape == truth.shape and ours.dtype == torch.float32
    assert errors[0] <= errors[1] + SLACK  # a NaN fails here


# Every number of lanes in use. 576 is a real width; 131 ends a sum of 128 with a ragged one.
@needs_kernel
@pytest.mark.parametrize("rows", range(1, 65))
def test_every_number_of_rows(rows):
    for depth, columns, bias in ((576, 96, False), (131, 97, True)):
        given = problem(rows, depth, columns, bias)
        assert_as_exact_as_torch(_cpu.few_rows_product(*given), *given)


# Tiles are of 24, 12, 8 and 6 columns, lines of 16 numbers, sums of 128.
@needs_kernel
@pytest.mark.parametrize("depth", [1, 15, 16, 17, 127, 128, 129, 257, 1000])
@pytest.mark.parametrize("columns", [1, 5, 7, 23, 25, 101])
@pytest.mark.parametrize("rows", [13, 17, 40, 64])
def test_odd_widths(rows, columns, depth):
    given = problem(rows, depth, columns)
    assert_as_exact_as_torch(_cpu.few_rows_product(*given), *given)


@needs_kernel
def test_threads_change_no_bit(threads):
    given = problem(33, 576, 1537)
    assert_as_exact_as_torch(_cpu.few_rows_product(*given), *given)
    torch.set_num_threads(1)
    assert torch.equal(_cpu.few_rows_product(*given), _cpu.few_rows_product(*given))


@needs_kernel
@pytest.mark.parametrize("rows", range(1, 66))
def test_the_public_function_takes_any_number_of_rows(rows, monkeypatch):
    taken = []
    product = _cpu.few_rows_product
    monkeypatch.setattr(_cpu, "few_rows_product", lambda *x: taken.append(1) or product(*x))
    given = problem(rows, 80, 30)
    assert_as_exact_as_torch(few_rows_linear(*given), *given)
    assert bool(taken) == (LEAST_ROWS <= rows <= 64)
    few_rows_linear(*problem(rows, LEAST_DEPTH - 1, 30))
    assert len(taken) <= 1, "a shallow product is torch's"


def adapted(rows, depth, columns, rank):
    """Operands of a linear map with an adapter of that rank."""
    left, right, bias = problem(rows, depth, columns)
    _, down, _ = problem(rows + 100, depth, rank)
    _, up, _ = problem(rows + 200, rank, columns)
    return left, right, bias, down, up, -0.7


def assert_adapter_as_exact_as_torch(ours, left, right, bias, down, up, scale):
    """As `assert_as_exact_as_torch`; the adapter's terms are those of both of its sums."""

    def composed(left, right, bias, down, up, scale):
        return F.linear(left, right, bias) + scale * F.linear(F.linear(left, down), up)

    given = left, right, bias, down, up
    truth = composed(*(x.double() for x in given), scale)
    size = composed(*(x.double().abs() for x in given), abs(scale))
    errors = [((x - truth).abs() / size).max() for x in (ours, composed(*given, scale))]
    assert ours.shape == truth.shape and ours.dtype == torch.float32
    assert errors[0] <= errors[1] + SLACK  # a NaN fails here


# A tile is of 24, 12, 8 or 6 columns of the adapter's first half; 131 ends a sum of 128.
@needs_kernel
@pytest.mark.parametrize("rank", [1, 5, 8, 16, 25, 131])
@pytest.mark.parametrize("rows", [1, 13, 16, 17, 33, 49, 64])
def test_an_adapter_in_the_same_pass(rows, rank):
    for depth, columns in ((131, 97), (576, 30)):
        left, right, bias, *adapter = given = adapted(rows, depth, columns, rank)
        ours = _cpu.few_rows_product(left, right, bias, _cpu.LowRank(*adapter))
        assert_adapter_as_exact_as_torch(ours, *given)


@needs_kernel
def test_threads_change_no_bit_of_an_adapter(threads):
    given = adapted(33, 576, 1537, 16)
    ours = few_rows_lora(*given)
    assert_adapter_as_exact_as_torch(ours, *given)
    torch.set_num_threads(1)
    assert torch.equal(few_rows_lora(*given), ours)


@pytest.mark.parametrize("rows", [1, LEAST_ROWS - 1, LEAST_ROWS, 64, 65])
def test_an_adapter_with_any_number_of_rows(rows):
    given = adapted(rows, 80, 30, 4)
    assert_adapter_as_exact_as_torch(few_rows_lora(*given), *given)
    left, right, _, *adapter = given
    halves = few_rows_lora(left.view(rows, 2, 40), right[:, :40].clone(), None, adapter[0][:, :40],
                           *adapter[1:])  # fmt: skip
    assert_adapter_as_exact_as_torch(
        halves.view(2 * rows, 30), left.view(2 * rows, 40), right[:, :40], torch.zeros(30),
        adapter[0][:, :40], *adapter[1:],
    )  # fmt: skip


def test_an_adapter_in_float32_on_a_base_of_16_bits_is_torchs():
    left, right, bias, down, up, scale = adapted(24, 80, 30, 4)
    low = left.bfloat16(), right.bfloat16(), bias.bfloat16()
    expected = F.linear(*low) + scale * F.linear(F.linear(low[0].float(), down), up)
    found = few_rows_lora(*low, down, up, scale)
    torch.testing.assert_close(found, expected.bfloat16(), atol=0.1, rtol=0.02)


@needs_kernel
def test_leading_dimensions_and_strides():
    left, right, bias = problem(24, 700, 51)
    cube = few_rows_linear(left.view(2, 12, 700), right, bias)
    assert torch.equal(cube.view(24, 51), few_rows_linear(left, right, bias))
    # Large enough that freed memory goes back to the system: it must live until it was read.
    wide = torch.full((24, 1400), torch.nan)
    wide[:, ::2] = left
    assert torch.equal(few_rows_linear(wide[:, ::2], right, bias), cube.view(24, 51))
    columns = left.t().contiguous().t()
    assert torch.equal(few_rows_linear(columns, right, bias), cube.view(24, 51))
    turned = right.t().contiguous().t()
    assert_as_exact_as_torch(few_rows_linear(left, turned, bias), left, turned, bias)


@needs_kernel
@pytest.mark.parametrize("columns", [1, 5, 30, 101])
@pytest.mark.parametrize("rows", [12, 16, 17, 33, 64])
def test_a_weight_in_bfloat16_is_not_rounded_further(rows, columns):
    for depth in (64, 129, 576):
        left, right, bias = problem(rows, depth, columns)
        low = right.bfloat16()
        assert fits_few_rows(left, low)
        ours = few_rows_linear(left, low, bias)
        assert_as_exact_as_torch(ours, left, low.float(), bias)
        # The same products of the same numbers, in the same order.
        assert torch.equal(ours, few_rows_linear(left, low.float(), bias))


def test_other_types_are_torchs():
    left, right, bias = problem(24, 80, 30)
    for dtype in (torch.bfloat16, torch.float64):
        given = left.to(dtype), right.to(dtype), bias.to(dtype)
        assert torch.equal(few_rows_linear(*given), F.linear(*given))


@pytest.mark.parametrize("module", [None, object()], ids=["none", "an older one"])
def test_without_the_kernel_torch_multiplies(module, monkeypatch):
    monkeypatch.setattr(_cpu, "_csrc", module)
    given = problem(24, 80, 30)
    assert torch.equal(few_rows_linear(*given), F.linear(*given))
