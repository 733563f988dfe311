"""The policy losses of token statistics, as formulas, identities and gradients."""

import pytest
import torch

from fastrlhf_kernels import PolicyLossSpec, _cpu, policy_loss, token_losses
from fastrlhf_kernels._records import LOSSES

needs_csrc = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")


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


def autograd_of(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def test_ppo_kl_is_the_penalised_objective(head_problem):
    p = head_problem(40)
    logprobs = (p.old_logprobs + 0.3 * p.hidden[:, 0]).requires_grad_()
    spec = PolicyLossSpec(loss="ppo_kl", old_kl_coef=0.7)
    out = policy_loss(logprobs, p.old_logprobs, p.advantages, p.mask, spec)
    log_ratio = logprobs - p.old_logprobs
    ratio = log_ratio.exp()
    textbook = (0.7 * (ratio - 1 - log_ratio) - ratio * p.advantages)[p.mask].mean()
    torch.testing.assert_close(out.loss, textbook)
    torch.testing.assert_close(autograd_of(out.loss, logprobs), autograd_of(textbook, logprobs))
    # The penalty pulls towards the old policy: with the sign turned, the gradient is another.
    turned = (0.7 * (1 + log_ratio - ratio) - ratio * p.advantages)[p.mask].mean()
    assert (
        autograd_of(out.loss, logprobs)[0] - autograd_of(turned, logprobs)[0]
    ).abs().max() > 1e-3


def test_cispo_weighs_the_score_function_and_lets_no_gradient_through_the_weight(head_problem):
    p = head_problem(40)
    logprobs = (p.old_logprobs + 0.3 * p.hidden[:, 0]).requires_grad_()
    spec = PolicyLossSpec(loss="cispo", cliprange_low=0.1, cliprange_high=0.3)
    out = policy_loss(logprobs, p.old_logprobs, p.advantages, p.mask, spec)
    weight = (logprobs - p.old_logprobs).exp().clamp(0.9, 1.3).detach()
    expected = torch.where(p.mask, -weight * p.advantages, 0) / p.mask.sum()
    torch.testing.assert_close(autograd_of(out.loss, logprobs)[0], expected)
    torch.testing.assert_close(out.loss, (expected * logprobs).sum())
    # Clipped tokens keep their gradient: what PPO drops.
    assert out.stats.clipfrac > 0 and expected[p.mask].ne(0).all()


@pytest.mark.parametrize("shaped", [False, True])
def test_gspo_clips_the_sequence_and_differentiates_the_token(head_problem, shaped):
    p = head_problem(40)
    logprobs = (p.old_logprobs + 0.3 * p.hidden[:, 0]).requires_grad_()
    spec = PolicyLossSpec(
        loss="gspo", cliprange_low=0.05, cliprange_high=0.05, aggregation="sequence_mean"
    )
    shape = (5, 8)
    given = [x.reshape(shape) for x in (logprobs, p.old_logprobs, p.advantages, p.mask)]
    if shaped:
        out = policy_loss(*given, spec)
    else:
        ids = torch.arange(5).repeat_interleave(8).flip(0)
        out = policy_loss(logprobs, p.old_logprobs, p.advantages, p.mask, spec, sequence_ids=ids)
    new, old, advantages, mask = given
    losses, clipped = [], []
    for i in range(5):
        ratio = (new[i] - old[i])[mask[i]].mean().detach().exp()
        token = ratio * (new[i] - new[i].detach()).exp()
        objective = torch.minimum(token * advantages[i], token.clamp(0.95, 1.05) * advantages[i])
        losses.append(-objective[mask[i]].mean())
        clipped.append(not 0.95 < ratio < 1.05)
    assert any(clipped) and not all(clipped)
    textbook = torch.stack(losses).mean()
    torch.testing.assert_close(out.loss, textbook)
    torch.testing.assert_close(autograd_of(out.loss, logprobs), autograd_of(textbook, logprobs))


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


def test_ratio_1_makes_every_gradient_that_of_reinforce(head_problem):
    p = head_problem()
    grads = []
    for loss in LOSSES:
        logprobs = p.old_logprobs.clone().requires_grad_()
        policy_loss(
            logprobs, p.old_logprobs, p.advantages, p.mask, PolicyLossSpec(loss=loss),
            sequence_ids=torch.arange(p.mask.numel()) // 5,
        ).loss.backward()  # fmt: skip
        grads.append(logprobs.grad)
    for other in grads[1:]:
        assert torch.equal(grads[0], other)
    assert grads[0][p.mask].ne(0).all()


@pytest.mark.parametrize("loss", [x for x in LOSSES if x not in ("cispo", "gspo")])
def test_gradcheck(head_problem, loss):
    """Without those whose loss is not the integral of its gradient: they have their own tests."""
    p = head_problem(6)
    logprobs = (p.old_logprobs + 0.1 * p.advantages).requires_grad_()
    entropy, kl = (x.abs().requires_grad_() for x in (p.hidden[:, 0], p.hidden[:, 1]))
    spec = PolicyLossSpec(loss=loss, kl_coef=0.1, entropy_coef=0.05)

    def value(logprobs, entropy, kl):
        return policy_loss(
            logprobs, p.old_logprobs, p.advantages, p.mask, spec, entropy=entropy, kl=kl
        ).loss

    assert torch.autograd.gradcheck(value, (logprobs, entropy, kl))


def test_policy_loss_needs_what_its_spec_names(head_problem):
    p = head_problem()
    given = (p.old_logprobs, p.old_logprobs, p.advantages, p.mask)
    with pytest.raises(ValueError, match="needs entropy"):
        policy_loss(*given, PolicyLossSpec(entropy_coef=0.1))
    with pytest.raises(ValueError, match="exact KL"):
        policy_loss(*given, PolicyLossSpec(kl_coef=0.1))


KL_TERMS = {
    "none": {},
    "exact": {"kl_coef": 0.1},
    "k2": {"kl_coef": 0.1, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.1, "kl_estimator": "k3"},
}


@pytest.mark.parametrize("kl_term", KL_TERMS)
@pytest.mark.parametrize("loss", [*LOSSES, "dual"])
def test_the_derivatives_written_down_are_those_of_autograd(head_problem, loss, kl_term):
    p = head_problem(40)
    named = {"loss": "ppo_clip", "dual_clip": 1.1} if loss == "dual" else {"loss": loss}
    if loss == "ppo_kl":
        named["old_kl_coef"] = 0.7
    spec = PolicyLossSpec(entropy_coef=0.05, **named, **KL_TERMS[kl_term])
    logprobs = (p.old_logprobs + 0.3 * p.hidden[:, 0]).requires_grad_()
    entropy, kl = (p.hidden[:, i].abs().requires_grad_() for i in (1, 2))
    given = {"ref_logprobs": p.old_logprobs + 0.1 * p.hidden[:, 3]}
    if loss == "gspo":
        given["sequence_log_ratios"] = 0.2 * p.hidden[:, 4]
    rows = token_losses.policy_rows(
        spec, logprobs, p.old_logprobs, p.advantages, entropy=entropy, kl=kl, **given
    )
    leaves = (logprobs, entropy, kl)
    truth = torch.autograd.grad(rows.loss.sum(), leaves, materialize_grads=True)
    with torch.no_grad():
        written = token_losses.policy_derivatives(
            spec, logprobs, p.old_logprobs, p.advantages, **given
        )
    torch.testing.assert_close(written, torch.stack(truth, -1), rtol=1e-12, atol=1e-12)
    assert 0 < rows.clipped.sum() < 40


def spec_of(loss, kl_term, **options):
    named = {"loss": "ppo_clip", "dual_clip": 1.1} if loss == "dual" else {"loss": loss}
    if loss == "ppo_kl":
        named["old_kl_coef"] = 0.7
    return PolicyLossSpec(**named, **KL_TERMS[kl_term], **options)


def evaluate(spec, backend, dtype, shape=(300, 257)):
    """Loss, statistics and gradients of one problem whose masked rows hold NaN."""
    generator = torch.Generator().manual_seed(0)
    old, ref, advantages, new, entropy, kl = torch.randn(6, *shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[1:3] = False
    old, new, ref = -old.abs(), -(old + 0.3 * new).abs(), -(old + 0.3 * ref).abs()
    given = [
        x.masked_fill(~mask, torch.nan)
        for x in (new, entropy.abs(), kl.abs(), old, advantages, ref)
    ]
    leaves = [x.to(dtype).requires_grad_() for x in given[:3]]
    has_kl = spec.kl_estimator == "exact"
    out = policy_loss(
        leaves[0], given[3], given[4], mask, spec, entropy=leaves[1],
        kl=leaves[2] if has_kl else None, ref_logprobs=None if has_kl else given[5],
        num_items=torch.tensor(1000) if spec.aggregation == "constant" else None, backend=backend,
    )  # fmt: skip
    used = leaves if has_kl else leaves[:2]
    grads = torch.autograd.grad(3 * out.loss, used, materialize_grads=True)
    assert all(g.dtype == dtype and g[~mask].eq(0).all() for g in grads)
    return [out.loss.detach(), *out.stats, *grads]


@needs_csrc
@pytest.mark.parametrize("kl_term", KL_TERMS)
@pytest.mark.parametrize("loss", [*LOSSES, "dual"])
def test_both_backends_agree(loss, kl_term, relative_rms):
    for aggregation in ("sequence_mean",) if loss == "gspo" else ("token_mean", "constant"):
        spec = spec_of(loss, kl_term, entropy_coef=0.05, aggregation=aggregation)
        truth = evaluate(spec, "reference", torch.float64)
        eager = evaluate(spec, "reference", torch.float32)
        ours = evaluate(spec, "cpu", torch.float32)
        for got, other, exact in zip(ours, eager, truth, strict=True):
            assert relative_rms(got, exact) <= relative_rms(other, exact) + 3e-7
    # A flipped sign of the advantages, for one, is far outside of that.
    assert relative_rms(-ours[6], truth[6]) > 0.1


@needs_csrc
def test_threads_change_no_bit_and_half_types_come_back_as_they_were():
    spec = spec_of("ppo_clip", "k3", entropy_coef=0.05)
    single, half = (evaluate(spec, "cpu", x) for x in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(half[0], single[0], rtol=0.02, atol=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        again = evaluate(spec, "cpu", torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(single, again, strict=True))


@needs_csrc
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_valid_row_and_a_ratio_that_overflows(backend):
    x, no_row = torch.tensor([90.0, 800.0, -800.0]), torch.zeros(3, dtype=torch.bool)
    old, advantages, spec = torch.zeros(3), torch.ones(3), PolicyLossSpec(dual_clip=2.0)
    leaf = x.clone().requires_grad_()
    out = policy_loss(leaf, old, advantages, no_row, spec, backend=backend)
    out.loss.backward()
    assert out.loss == 0 and leaf.grad.eq(0).all() and out.stats.ratio == 0
    leaf = x.clone().requires_grad_()
    out = policy_loss(leaf, old, advantages, ~no_row, spec, backend=backend)
    out.loss.backward()
    torch.testing.assert_close(out.loss, torch.tensor(-2.4 / 3))
    assert leaf.grad.eq(0).all() and out.stats.ratio.isinf()


@needs_csrc
@pytest.mark.parametrize("spec", [
    PolicyLossSpec(kl_estimator="k2"), PolicyLossSpec(kl_estimator="k3"),
    PolicyLossSpec(loss="ppo_kl"),
])  # fmt: skip
def test_a_coefficient_of_0_leaves_an_infinity_out(spec):
    old, mask = torch.tensor([-1.0, -2.0, -3.0]), torch.ones(3, dtype=torch.bool)
    advantages, found = torch.tensor([0.5, -1.0, 2.0]), []
    logprobs, ref = torch.tensor([-1.1, -2.2, -2.9]), torch.tensor([-1.0, -torch.inf, -3.0])
    if spec.loss == "ppo_kl":
        logprobs, ref = logprobs.index_fill(0, torch.tensor([2]), -torch.inf), None
    for backend in ("reference", "cpu"):
        leaf = logprobs.clone().requires_grad_()
        out = policy_loss(leaf, old, advantages, mask, spec, ref_logprobs=ref, backend=backend)
        found.append((out.loss, *torch.autograd.grad(out.loss, leaf)))
        assert all(x.isfinite().all() for x in found[-1])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@needs_csrc
def test_under_torch_compile_it_is_plain_torch():
    def loss(x):
        y = torch.zeros(40)
        return policy_loss(x, y, y + 1, y == 0, PolicyLossSpec(), num_items=40).loss

    x = torch.linspace(-1, 1, 40)
    compiled = torch.compile(loss, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, loss(x))
