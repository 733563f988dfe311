"""The losses of vectors: the clipped value loss, and the policy losses as formulas."""

import pytest
import torch

from fastrlhf_kernels import PolicyLossSpec, policy_loss, value_loss


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


def test_ppo_is_the_textbook_minimum(head_problem):
    p = head_problem(40)
    logprobs = (p.old_logprobs + 0.3 * p.hidden[:, 0]).requires_grad_()
    out = policy_loss(logprobs, p.old_logprobs, p.advantages, p.mask, PolicyLossSpec())
    ratio = (logprobs - p.old_logprobs).exp()
    objective = torch.minimum(ratio * p.advantages, ratio.clamp(0.8, 1.2) * p.advantages)
    textbook = -objective[p.mask].mean()
    torch.testing.assert_close(out.loss, textbook)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logprobs)[0] for loss in (out.loss, textbook))
    )
    ratio = ratio.detach()
    clipped = ((p.advantages > 0) & (ratio > 1.2)) | ((p.advantages < 0) & (ratio < 0.8))
    assert 0 < clipped[p.mask].sum() < p.mask.sum()
    expected = {
        "approx_kl": (ratio - 1 - ratio.log())[p.mask].mean(),
        "clipfrac": clipped[p.mask].double().mean(),
        "ratio": ratio[p.mask].mean(),
    }
    for name, x in expected.items():
        torch.testing.assert_close(getattr(out.stats, name), x)
    assert out.stats.entropy.isnan() and out.stats.kl.isnan()
    # A dropped mask or a flipped sign would be seen.
    assert (out.loss + objective.mean()).abs() > 1e-3
    assert (out.loss + textbook).abs() > 1e-3


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    old, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    logprobs = torch.tensor([3.0, 0.5, 90.0]).requires_grad_()
    ratio = torch.tensor(0.5).exp()
    advantages = torch.tensor([-1.0, -1.0, -1.0])
    spec = PolicyLossSpec(dual_clip=2.0, aggregation="constant")
    out = policy_loss(logprobs, old, advantages, mask, spec, num_items=1)
    torch.testing.assert_close(out.loss, 2.0 + ratio + 2.0)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 1.0, 0.0]) * ratio)


def test_estimators():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)
    zero, mask = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    gap = logprobs - ref
    expected = {"k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}
    for name, kl in expected.items():
        spec = PolicyLossSpec(kl_coef=0.5, kl_estimator=name)
        out = policy_loss(logprobs, logprobs, zero, mask, spec, ref_logprobs=ref)
        torch.testing.assert_close(out.loss, 0.5 * kl.mean())
        torch.testing.assert_close(out.stats.kl, kl.mean())
    exact = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)
    out = policy_loss(
        logprobs, logprobs, zero, mask, PolicyLossSpec(kl_coef=0.5, entropy_coef=0.1),
        entropy=exact * 2, kl=exact,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, 0.5 * exact.mean() - 0.1 * 2 * exact.mean())


def test_aggregations(head_problem):
    p = head_problem(12)
    given = (p.old_logprobs + 0.1, p.old_logprobs, p.advantages)
    per_token = -(torch.tensor(0.1, dtype=torch.float64).exp() * p.advantages)
    mask, tokens = p.mask.reshape(3, 4), per_token.reshape(3, 4)
    spec = PolicyLossSpec(aggregation="sequence_mean", cliprange_high=0.5, cliprange_low=0.5)
    shaped = [x.reshape(3, 4) for x in given]
    out = policy_loss(*shaped, mask, spec)
    expected = sum(tokens[i][mask[i]].mean() for i in range(3)) / 3
    torch.testing.assert_close(out.loss, expected)
    ids = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2, 9, 9, 9, 9])
    torch.testing.assert_close(policy_loss(*given, p.mask, spec, sequence_ids=ids).loss, expected)
    constant = PolicyLossSpec(aggregation="constant", cliprange_high=0.5, cliprange_low=0.5)
    out = policy_loss(*given, p.mask, constant, num_items=3 * 4)
    torch.testing.assert_close(out.loss, per_token[p.mask].sum() / 12)


def test_ratio_1_makes_the_ppo_gradient_that_of_reinforce(head_problem):
    p = head_problem()
    grads = []
    for loss in ("ppo_clip", "reinforce"):
        logprobs = p.old_logprobs.clone().requires_grad_()
        policy_loss(
            logprobs, p.old_logprobs, p.advantages, p.mask, PolicyLossSpec(loss=loss)
        ).loss.backward()
        grads.append(logprobs.grad)
    assert torch.equal(*grads)
    assert grads[0][p.mask].ne(0).all()


def test_gradcheck(head_problem):
    p = head_problem(6)
    logprobs = (p.old_logprobs + 0.1 * p.advantages).requires_grad_()
    entropy, kl = (x.abs().requires_grad_() for x in (p.hidden[:, 0], p.hidden[:, 1]))
    spec = PolicyLossSpec(kl_coef=0.1, entropy_coef=0.05)

    def loss(logprobs, entropy, kl):
        return policy_loss(
            logprobs, p.old_logprobs, p.advantages, p.mask, spec, entropy=entropy, kl=kl
        ).loss

    assert torch.autograd.gradcheck(loss, (logprobs, entropy, kl))


def test_policy_loss_needs_what_its_spec_names(head_problem):
    p = head_problem()
    given = (p.old_logprobs, p.old_logprobs, p.advantages, p.mask)
    with pytest.raises(ValueError, match="needs entropy"):
        policy_loss(*given, PolicyLossSpec(entropy_coef=0.1))
    with pytest.raises(ValueError, match="exact KL"):
        policy_loss(*given, PolicyLossSpec(kl_coef=0.1))
