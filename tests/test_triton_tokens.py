"""Triton's losses of tokens against autograd of their specification."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from fastrlhf_kernels import PolicyLossSpec, policy_loss, token_losses, value_loss

pytest.importorskip("triton")

from fastrlhf_kernels import _triton_tokens
from fastrlhf_kernels._triton_tokens import (
    policy_coefficients,
    policy_rows,
    value_rows,
)

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
LOSSES = {
    "ppo_clip": PolicyLossSpec(),
    "dual_clip": PolicyLossSpec(dual_clip=1.3),
    "ppo_kl": PolicyLossSpec(loss="ppo_kl", old_kl_coef=0.3),
    "cispo": PolicyLossSpec(loss="cispo", cliprange_high=0.1),
    "gspo": PolicyLossSpec(loss="gspo", cliprange_low=0.03, cliprange_high=0.04),
    "reinforce": PolicyLossSpec(loss="reinforce"),
}
ITEMS = 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_triton_tokens, "BLOCK", 16)


class Tokens:
    """[n] of everything that a loss may take, float32 on the device."""

    def __init__(self, device, n=39):
        generator = torch.Generator().manual_seed(n)

        def normal():
            return torch.randn(n, generator=generator).to(device)

        self.logprobs = -normal().abs()
        self.old_logprobs = self.logprobs + 0.4 * normal()
        self.advantages = normal()
        self.entropy, self.kl = normal().abs(), normal().abs()
        self.ref_logprobs = self.logprobs + 0.3 * normal()
        self.sequence_log_ratios = 0.05 * normal()
        self.weights = torch.rand(n, generator=generator).to(device) + 0.1
        # Ratio 1 and the edge of the estimators' series.
        self.old_logprobs[0] = self.logprobs[0]
        self.ref_logprobs[1:3] = self.logprobs[1:3] + torch.tensor([1.0, -1.0], device=device)


NAMES = ("logprobs", "entropy", "kl")


def specified(spec, p, *, dtype=torch.float32, given=("entropy", "kl", "ref_logprobs")):
    """Derivatives [n, 3] and rows [n, 6] of token_losses in `dtype`."""
    leaves = [getattr(p, name).to(dtype).requires_grad_() for name in NAMES]

    def of(name):
        return getattr(p, name).to(dtype) if name in given else None

    rows = token_losses.policy_rows(
        spec, leaves[0], p.old_logprobs.to(dtype), p.advantages.to(dtype),
        entropy=leaves[1] if "entropy" in given else None, kl=leaves[2] if "kl" in given else None,
        ref_logprobs=of("ref_logprobs"), sequence_log_ratios=p.sequence_log_ratios.to(dtype),
    )  # fmt: skip
    total = (p.weights.to(dtype) * rows.loss).sum() / ITEMS
    derivatives = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return torch.stack(derivatives, -1), torch.stack([x.detach() for x in rows], -1)


def launched(spec, p, given=("entropy", "kl", "ref_logprobs"), num_items=ITEMS):
    return policy_rows(
        spec, p.logprobs, p.old_logprobs, p.advantages, p.weights, num_items,
        sequence_log_ratios=p.sequence_log_ratios if spec.loss == "gspo" else None,
        **{x: getattr(p, x) if x in given else None for x in ("entropy", "kl", "ref_logprobs")},
    )  # fmt: skip


def close(got, truth, eager):
    """Each column no further from float64 than eager float32, plus a few roundings."""
    for ours, theirs, true in zip(got.unbind(-1), eager.unbind(-1), truth.unbind(-1), strict=True):
        if true.isnan().all():
            assert ours.isnan().all()
        elif (ours - true).norm() > (theirs - true).norm() + 3e-7 * true.norm() + 1e-12:
            return False
    return True


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
@pytest.mark.parametrize("loss", LOSSES)
def test_policy_rows_are_their_specification(device, loss, estimator):
    p = Tokens(device)
    spec = replace(LOSSES[loss], kl_estimator=estimator, kl_coef=0.2, entropy_coef=0.1)
    truth, eager = specified(spec, p, dtype=torch.float64), specified(spec, p)
    got = launched(spec, p)
    assert all(close(*x) for x in zip(got, truth, eager, strict=True))
    if loss != "reinforce":
        assert 0 < truth[1][:, 2].sum() < 39
    # The rule can fail: a coefficient off by 0.01 %, another estimator, a flipped advantage.
    wrong = launched(replace(spec, kl_coef=0.2 * 1.0001), p)
    assert not all(close(*x) for x in zip(wrong, truth, eager, strict=True))
    wrong = launched(replace(spec, kl_estimator={"k2": "k3"}.get(estimator, "k2")), p)
    assert not close(wrong[0], truth[0], eager[0])
    p.advantages *= -1
    assert not close(launched(spec, p)[0], truth[0], eager[0])


@pytest.mark.parametrize(
    "given", [(), ("entropy",), ("kl",), ("ref_logprobs",), ("kl", "ref_logprobs")]
)
def test_what_is_not_given_is_unknown(device, given):
    p = Tokens(device)
    for spec in (PolicyLossSpec(), PolicyLossSpec(kl_estimator="k2")):
        truth = specified(spec, p, dtype=torch.float64, given=given)
        eager, got = specified(spec, p, given=given), launched(spec, p, given=given)
        assert all(close(*x) for x in zip(got, truth, eager, strict=True))


def test_a_table_gives_the_same_bits(device):
    p = Tokens(device)
    table = torch.full((39, 8), torch.nan, device=device)
    for column, name in ((4, "logprobs"), (5, "entropy"), (6, "kl"), (7, "ref_logprobs")):
        table[:, column] = getattr(p, name)
    given = (p.old_logprobs, p.advantages)
    for estimator, loss in product(("exact", "k3"), ("ppo_clip", "gspo")):
        spec = replace(LOSSES[loss], kl_estimator=estimator, kl_coef=0.2, entropy_coef=0.1)
        rest = (p.sequence_log_ratios if loss == "gspo" else None, p.weights)
        expected = launched(spec, p)
        for items in (ITEMS, torch.tensor(ITEMS, device=device)):
            got = policy_coefficients(spec, table, *given, None, *rest, items, True)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        table[:, 6] = torch.nan
        other = p.ref_logprobs + 0.1
        if estimator == "k3":
            got = policy_coefficients(spec, table, *given, other, *rest, ITEMS, False)
            q = Tokens(device)
            q.ref_logprobs = other
            expected = launched(spec, q, given=("entropy", "ref_logprobs"))
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        table[:, 6] = p.kl
    nothing = policy_coefficients(
        PolicyLossSpec(), table[:0], *[x[:0] for x in given], None, None, p.weights[:0], 1, False
    )
    assert [x.shape for x in nothing] == [(0, 3), (0, 6)]


def test_one_row_may_come_from_anywhere(device):
    # The stride of a dimension of one is whatever made it, and different for each input.
    p = Tokens(device)
    for name in (*NAMES, "old_logprobs", "advantages", "ref_logprobs", "weights"):
        setattr(p, name, getattr(p, name)[3:4])
    spec = replace(LOSSES["ppo_clip"], kl_estimator="exact", kl_coef=0.2, entropy_coef=0.1)
    expected = launched(spec, p)
    p.logprobs = torch.stack([p.logprobs] * 5, -1)[:, 2]
    p.kl = torch.stack([p.kl] * 3, -1)[:, 1]
    assert len({x.stride(0) for x in (p.logprobs, p.entropy, p.kl)}) == 3
    got = launched(spec, p)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_rows_of_weight_0_are_not_read_and_rows_stand_alone(device):
    p = Tokens(device)
    spec = replace(LOSSES["ppo_clip"], kl_estimator="k3", kl_coef=0.2, entropy_coef=0.1)
    clean = launched(spec, p)
    gone = torch.arange(39, device=device) % 4 == 1
    p.weights[gone] = 0
    for name in (*NAMES, "old_logprobs", "advantages", "ref_logprobs"):
        getattr(p, name)[gone] = torch.nan
    for got, expected in zip(launched(spec, p), clean, strict=True):
        assert got[gone].eq(0).all() and torch.equal(got[~gone], expected[~gone])


def test_policy_identities(device):
    p = Tokens(device)
    p.old_logprobs = p.logprobs.clone()
    p.ref_logprobs = p.logprobs.clone()
    spec = replace(LOSSES["ppo_clip"], kl_estimator="k3", kl_coef=0.2)
    coefficients, rows = launched(spec, p)
    # Ratio 1: the gradient of PPO is that of REINFORCE, and nothing is clipped or apart.
    plain, _ = launched(LOSSES["reinforce"], p)
    assert torch.equal(coefficients[:, 0], plain[:, 0])
    assert rows[:, 1:3].eq(0).all() and rows[:, 3].eq(1).all()
    assert launched(spec, p, given=("ref_logprobs",))[1][:, 5].eq(0).all()
    # The ratio of a clipped token may overflow: its loss is the bound's, its gradient none.
    p.old_logprobs[:2] = -200
    p.logprobs[:2], p.advantages[:2] = -1, torch.tensor([1.0, -1.0], device=device)
    coefficients, rows = launched(replace(LOSSES["dual_clip"], kl_coef=0), p)
    assert coefficients[:2, 0].eq(0).all()
    torch.testing.assert_close(rows[:2, 0], torch.tensor([-1.2, 1.3], device=device))


@pytest.mark.parametrize("cliprange", [None, 0.2])
def test_value_rows(device, cliprange):
    generator = torch.Generator().manual_seed(0)
    values, gaps, returns = torch.randn(3, 39, generator=generator).to(device)
    old_values = values + 0.3 * gaps
    mask = torch.arange(39, device=device) % 4 != 1
    for x in (values, old_values, returns):
        x[~mask] = torch.nan
    got = value_rows(values, old_values, returns, mask, cliprange)
    assert got[~mask].eq(0).all()
    leaf = values[mask].requires_grad_()
    mean = token_losses.RowMean(torch.ones_like(leaf), 1)
    loss, stats = token_losses.value_loss(leaf, old_values[mask], returns[mask], mean, cliprange)
    torch.testing.assert_close(got[:, 0].sum(), loss.detach(), rtol=1e-6, atol=0)
    assert got[:, 1].sum() == stats.clipfrac and (cliprange is None) == (stats.clipfrac == 0)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(got[mask, 2], gradient, rtol=1e-6, atol=0)
    if cliprange:  # without the clip it is another loss
        plain = value_rows(values, old_values, returns, mask, None)
        assert (plain[:, 0].sum() / loss - 1).abs() > 1e-3


def outcome(op, inputs, **options):
    """Loss, statistics, and the gradients of the inputs that have one."""
    leaves = [x.detach().clone().requires_grad_(x.dtype.is_floating_point) for x in inputs]
    out = op(*leaves, **options)
    assert not any(x.requires_grad for x in out.stats)
    gradients = torch.autograd.grad(3 * out.loss, leaves[:1], allow_unused=True)
    return [out.loss.detach(), *out.stats], gradients


AGGREGATIONS = {
    "token_mean": {},
    "sequence_mean": {},
    "constant": {"num_items": 40},
    "ids": {},
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", ["ppo_clip", "gspo"])
def test_policy_loss_is_the_reference_s(device, loss, aggregation):
    p, options = Tokens(device, 30), dict(AGGREGATIONS[aggregation])
    mask = torch.arange(30, device=device).reshape(5, 6) % 4 != 1
    mask[2] = False
    if aggregation == "ids":
        options["sequence_ids"] = torch.arange(30, device=device).reshape(5, 6) // 9
        options["num_items"] = torch.tensor(3, device=device)
        aggregation = "sequence_mean"
    spec = replace(
        LOSSES[loss], aggregation=aggregation, kl_coef=0.2, kl_estimator="k2", entropy_coef=0.1
    )
    inputs = [x.reshape(5, 6) for x in (p.logprobs, p.old_logprobs, p.advantages)]
    for x in inputs:
        x[~mask] = torch.nan

    def run(backend):
        def op(*given):
            return policy_loss(
                *given, mask, spec, ref_logprobs=p.ref_logprobs.reshape(5, 6),
                entropy=p.entropy.reshape(5, 6).bfloat16(), backend=backend, **options,
            )  # fmt: skip

        return outcome(op, inputs)

    for got, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7, equal_nan=True)


def test_losses_are_differentiable_where_they_are_asked_to_be(device):
    p = Tokens(device, 8)
    mask = torch.ones(8, dtype=torch.bool, device=device)
    spec = PolicyLossSpec(kl_coef=0.3, entropy_coef=0.1)
    results = []
    for backend in ("triton", "reference"):
        leaves = [getattr(p, name).bfloat16().requires_grad_() for name in ("entropy", "kl")]
        out = policy_loss(
            p.logprobs, p.old_logprobs, p.advantages, mask, spec, entropy=leaves[0], kl=leaves[1],
            backend=backend,
        )  # fmt: skip
        results.append(torch.autograd.grad(out.loss, leaves))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected)
    empty = policy_loss(
        p.logprobs, p.old_logprobs, p.advantages, ~mask, PolicyLossSpec(), backend="triton"
    )
    assert empty.loss == 0 and empty.stats.entropy == 0


@pytest.mark.parametrize("num_items", [None, 50])
def test_value_loss_is_the_reference_s(device, num_items):
    values, old_values, returns = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(30, device=device).reshape(5, 6) % 4 != 1
    inputs = [x.to(device) for x in (values, values + 0.2 * old_values, returns)]
    results = [
        outcome(
            value_loss, [*inputs, mask], cliprange_value=0.1, num_items=num_items, backend=backend
        )
        for backend in ("triton", "reference")
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)


def test_variants_name_every_argument():
    listed = list(_triton_tokens.variants("sm_80"))
    assert len({(x.name, x.config) for x in listed}) == len(listed)
    for x in listed:
        assert list(x.signature) == list(x.kernel.arg_names)
