"""The clipped value loss, as formula, identities and gradient."""

import pytest
import torch

from fastrlhf_kernels import value_loss


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    return values, old_values, returns, torch.rand(40, generator=generator) < 0.7


def test_is_the_half_of_the_larger_error(inputs):
    values, old_values, returns, mask = inputs
    out = value_loss(*inputs, cliprange_value=0.2)
    bounded = old_values + (values - old_values).clamp(-0.2, 0.2)
    errors = (values - returns) ** 2, (bounded - returns) ** 2
    torch.testing.assert_close(out.loss, torch.maximum(*errors)[mask].mean() / 2)
    torch.testing.assert_close(out.stats.clipfrac, (errors[1] > errors[0])[mask].double().mean())
    # What fails with the smaller error, or with the mask dropped, is being measured.
    assert (out.loss - torch.minimum(*errors)[mask].mean() / 2).abs() > 1e-3
    assert (out.loss - torch.maximum(*errors).mean() / 2).abs() > 1e-3


def test_without_a_range_or_inside_it_it_is_the_squared_error(inputs):
    values, _, returns, mask = inputs
    expected = (values - returns)[mask].square().mean() / 2
    for cliprange_value in (None, 1e6):
        out = value_loss(*inputs, cliprange_value=cliprange_value)
        torch.testing.assert_close(out.loss, expected)
        assert out.stats.clipfrac == 0


def test_gradient(inputs):
    values, old_values, returns, mask = inputs
    values = values.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, old_values, returns, mask, cliprange_value=0.2).loss, values
    )
    value_loss(values, old_values, returns, mask, cliprange_value=0.2).loss.backward()
    assert values.grad[~mask].eq(0).all()


def test_microbatches_add_up_and_masked_rows_are_not_read(inputs):
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


def test_no_valid_row_gives_a_loss_of_0_with_a_gradient(inputs):
    values, old_values, returns, mask = inputs
    values = values.clone().requires_grad_()
    out = value_loss(values, old_values, returns, mask & False, cliprange_value=0.2)
    out.loss.backward()
    assert out.loss == 0 and values.grad.eq(0).all()


def test_bad_input_raises(inputs):
    values, old_values, returns, mask = inputs
    with pytest.raises(ValueError, match=r"\[39\]"):
        value_loss(values[1:], old_values, returns, mask, cliprange_value=0.2)
    for cliprange_value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="cliprange_value"):
            value_loss(*inputs, cliprange_value=cliprange_value)
    with pytest.raises(ValueError, match="num_items"):
        value_loss(*inputs, cliprange_value=0.2, num_items=0)
