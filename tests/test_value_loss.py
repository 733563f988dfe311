"""The clipped value loss, as formula, identities and gradient."""

from functools import partial

import pytest
import torch

from fastrlhf_kernels import _cpu
from fastrlhf_kernels import value_loss as op

needs_csrc = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_csrc)])
def backend(request):
    return request.param


@pytest.fixture
def value_loss(backend):
    return partial(op, backend=backend)


@pytest.fixture
def inputs(backend):
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    if backend == "cpu":
        values, old_values, returns = values.float(), old_values.float(), returns.float()
    return values, old_values, returns, torch.rand(40, generator=generator) < 0.7


def test_is_the_half_of_the_larger_error(inputs, value_loss):
    values, old_values, returns, mask = inputs
    out = value_loss(*inputs, cliprange_value=0.2)
    bounded = old_values + (values - old_values).clamp(-0.2, 0.2)
    errors = (values - returns) ** 2, (bounded - returns) ** 2
    torch.testing.assert_close(out.loss, torch.maximum(*errors)[mask].mean() / 2)
    torch.testing.assert_close(
        out.stats.clipfrac, (errors[1] > errors[0])[mask].to(values.dtype).mean()
    )
    # What fails with the smaller error, or with the mask dropped, is being measured.
    assert (out.loss - torch.minimum(*errors)[mask].mean() / 2).abs() > 1e-3
    assert (out.loss - torch.maximum(*errors).mean() / 2).abs() > 1e-3


def test_without_a_range_or_inside_it_it_is_the_squared_error(inputs, value_loss):
    values, _, returns, mask = inputs
    expected = (values - returns)[mask].square().mean() / 2
    for cliprange_value in (None, 1e6):
        out = value_loss(*inputs, cliprange_value=cliprange_value)
        torch.testing.assert_close(out.loss, expected)
        assert out.stats.clipfrac == 0


def test_gradient(inputs, value_loss, backend):
    values, old_values, returns, mask = inputs
    values = values.clone().requires_grad_()
    if backend == "reference":
        assert torch.autograd.gradcheck(
            lambda x: value_loss(x, old_values, returns, mask, cliprange_value=0.2).loss, values
        )
    (3 * value_loss(values, old_values, returns, mask, cliprange_value=0.2).loss).backward()
    errors = values - returns, old_values + (values - old_values).clamp(-0.2, 0.2) - returns
    truth = 1.5 * torch.maximum(errors[0] ** 2, errors[1] ** 2)[mask].mean()
    torch.testing.assert_close(values.grad, torch.autograd.grad(truth, values)[0])
    assert values.grad[~mask].eq(0).all() and values.grad[mask].eq(0).any()


@needs_csrc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cliprange_value", [None, 0.2])
def test_both_backends_agree_and_threads_change_no_bit(dtype, cliprange_value, relative_rms):
    generator = torch.Generator().manual_seed(0)
    # Enough for two threads, with a ragged chunk at the end, in another layout than the mask's.
    values, old_values, returns = torch.randn(3, 257, 300, generator=generator).mT.to(dtype)
    mask = torch.rand(300, 257, generator=generator) < 0.8

    def run(backend, as_dtype=dtype):
        given = [x.to(as_dtype).masked_fill(~mask, torch.nan) for x in (old_values, returns)]
        leaf = values.to(as_dtype).masked_fill(~mask, torch.nan).requires_grad_()
        out = op(leaf, *given, mask, cliprange_value=cliprange_value, backend=backend)
        out.loss.backward()
        assert leaf.grad.dtype == as_dtype and out.loss.dim() == 0
        return out.loss, out.stats.clipfrac, leaf.grad

    truth, eager, ours = run("reference", torch.float64), run("reference"), run("cpu")
    for got, other, exact in zip(ours, eager, truth, strict=True):
        assert relative_rms(got, exact) <= relative_rms(other, exact) + 2e-7
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert all(torch.equal(x, y) for x, y in zip(ours, run("cpu"), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_microbatches_add_up_and_masked_rows_are_not_read(inputs, value_loss):
    values, old_values, returns, mask = inputs
    whole = value_loss(*inputs, cliprange_value=0.2)
    poisoned = [x.masked_fill(~mask, torch.nan) for x in (values, old_values, returns)]
    parts = [
        value_loss(*(x[s] for x in (*poisoned, mask)), cliprange_value=0.2, num_items=mask.sum())
        for s in (slice(0, 11), slice(11, 40))
    ]
    torch.testing.assert_close(whole.loss, parts[0].loss + parts[1].loss)
    torch.testing.assert_close(
        whole.stats.clipfrac, parts[0].stats.clipfrac + parts[1].stats.clipfrac
    )


def test_no_valid_row_gives_a_loss_of_0_with_a_gradient(inputs, value_loss):
    values, old_values, returns, mask = inputs
    values = values.clone().requires_grad_()
    out = value_loss(values, old_values, returns, mask & False, cliprange_value=0.2)
    out.loss.backward()
    assert out.loss == 0 and values.grad.eq(0).all()


def test_bad_input_raises(inputs, value_loss):
    values, old_values, returns, mask = inputs
    with pytest.raises(ValueError, match=r"\[39\]"):
        value_loss(values[1:], old_values, returns, mask, cliprange_value=0.2)
    for cliprange_value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="cliprange_value"):
            value_loss(*inputs, cliprange_value=cliprange_value)
    with pytest.raises(ValueError, match="num_items"):
        value_loss(*inputs, cliprange_value=0.2, num_items=0)
