"""The fused op against the composed one, and against float64 truth.

Tolerances and sizes as in test_linear_logprobs.py; every check of the fused op runs over several
chunks, with rows masked out and rows that PPO clips.
"""

import pytest
import torch
from backends import ON_CPU, cpu_only

from fastrlhf_kernels import (
    PolicyLossSpec,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
)
from fastrlhf_kernels.audit import OperatorMode

SLACK = 5e-7
WORKSPACE_MB = 0.05

SPECS = {
    "ppo": PolicyLossSpec(),
    "ppo with everything": PolicyLossSpec(
        cliprange_high=0.28, dual_clip=1.1, kl_coef=0.1, entropy_coef=0.05
    ),
    "k2": PolicyLossSpec(kl_coef=0.1, kl_estimator="k2"),
    "k3": PolicyLossSpec(kl_coef=0.1, kl_estimator="k3", loss="reinforce"),
    "sequences": PolicyLossSpec(aggregation="sequence_mean", kl_coef=0.1),
    "ppo_kl": PolicyLossSpec(loss="ppo_kl", old_kl_coef=0.3, entropy_coef=0.05),
    "cispo": PolicyLossSpec(loss="cispo", kl_coef=0.1),
    "gspo": PolicyLossSpec(
        loss="gspo", cliprange_low=0.03, cliprange_high=0.04, aggregation="sequence_mean"
    ),
}


def fused(p, spec, *, backend, requires=("hidden", "weight", "bias"), **options):
    """LossOutput and the gradients of `requires`."""
    leaves = {name: getattr(p, name).detach() for name in ("hidden", "weight", "bias")}
    for name in requires:
        leaves[name].requires_grad_()
    if spec.aggregation == "sequence_mean" or spec.loss == "gspo":
        options.setdefault("sequence_ids", torch.arange(p.targets.numel()) // 5)
    given = {
        "ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight, "ref_bias": p.ref_bias,
        "workspace_mb": WORKSPACE_MB, **options,
    }  # fmt: skip
    out = linear_policy_loss(
        leaves["hidden"], leaves["weight"], p.targets, p.old_logprobs, p.advantages, p.mask, spec,
        bias=leaves["bias"], backend=backend, **given,
    )  # fmt: skip
    wanted = [leaves[name] for name in requires]
    return out, torch.autograd.grad(out.loss, wanted) if wanted else ()


def flat(result):
    out, grads = result
    return [out.loss.detach(), *out.stats, *grads]


@pytest.mark.parametrize("name", SPECS)
def test_reference_is_the_composition(head_problem, name):
    p, spec = head_problem(), SPECS[name]
    options = {"ref_logprobs": p.old_logprobs - 0.1} if spec.kl_estimator != "exact" else {}
    out, grads = fused(p, spec, backend="reference", **options)
    leaves = [x.detach().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    tokens = linear_logprobs(
        leaves[0], leaves[1], p.targets, bias=leaves[2], ref_hidden=p.ref_hidden,
        ref_weight=p.ref_weight, ref_bias=p.ref_bias, backend="reference",
    )  # fmt: skip
    composed = policy_loss(
        tokens.logprobs, p.old_logprobs, p.advantages, p.mask, spec, entropy=tokens.entropy,
        kl=tokens.kl, sequence_ids=torch.arange(13) // 5, **options,
    )  # fmt: skip
    for x, y in zip(
        (out.loss, *out.stats, *grads),
        (composed.loss, *composed.stats, *torch.autograd.grad(composed.loss, leaves)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


CASES = {
    "plain": {},
    "soft cap, scale, row temperatures": {
        "temperature": torch.linspace(0.5, 2, 13), "softcap": 5.0, "logit_scale": 0.5,
    },
    "reverse": {"kl_direction": "reverse"},
    "padded vocabulary": {"valid_vocab": 901},
}  # fmt: skip


@cpu_only
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SPECS)
def test_cpu_is_as_close_to_the_truth_as_eager_float32(head_problem, relative_rms, name, case):
    p, spec, options = head_problem(), SPECS[name], CASES[case]
    if "valid_vocab" in options:
        p.targets.clamp_(max=900)
    small = p.to(torch.float32)
    truth = flat(fused(p, spec, backend="reference", **options))
    eager = flat(fused(small, spec, backend="reference", **options))
    ours = flat(fused(small, spec, backend="cpu", **options))
    assert 0 < truth[2] < 1  # some rows are clipped and some are not
    errors, eager_errors = (
        [relative_rms(x, t) for x, t in zip(got, truth, strict=True)] for got in (ours, eager)
    )
    # A loss of mixed signs is a small difference of large terms: its slack is a rounding of those.
    slack = [5e-6 if i < 6 else SLACK for i in range(len(errors))]
    assert all(a <= b + s for a, b, s in zip(errors, eager_errors, slack, strict=True)), errors


@cpu_only
def test_the_tolerance_sees_a_flipped_sign_and_a_dropped_mask(head_problem, relative_rms):
    p, spec = head_problem(), SPECS["ppo with everything"]
    truth = flat(fused(p, spec, backend="reference"))
    small = p.to(torch.float32)
    small.mask.fill_(True)
    dropped = flat(fused(small, spec, backend="cpu"))
    flipped = flat(fused(p.to(torch.float32).rows(slice(None)), SPECS["ppo"], backend="cpu"))
    for mutant in (dropped, flipped):
        assert all(relative_rms(x, t) > 1e-3 for x, t in zip(mutant[6:], truth[6:], strict=True))


@cpu_only
def test_log_probabilities_agree_to_the_last_bit_so_the_first_ratio_is_1(head_problem):
    p = head_problem(40).to(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        q = p.to(dtype)
        scored = linear_logprobs(
            q.hidden, q.weight, q.targets.masked_fill(~q.mask, -100), bias=q.bias,
            workspace_mb=WORKSPACE_MB, backend="cpu",
        )  # fmt: skip
        given = {"workspace_mb": WORKSPACE_MB, "bias": q.bias, "backend": "cpu"}
        # The sum of 30 ratios of exactly 1 is exactly 30.
        constant = PolicyLossSpec(aggregation="constant")
        for reference in ({}, {"ref_hidden": q.ref_hidden}):
            out = linear_policy_loss(
                q.hidden.requires_grad_(), q.weight, q.targets, scored.logprobs.detach(),
                q.advantages, q.mask, constant, num_items=1, **given, **reference,
            )  # fmt: skip
            assert out.stats.ratio == q.mask.sum()
            assert out.stats.approx_kl == 0 and out.stats.clipfrac == 0


@pytest.mark.parametrize("backend", ON_CPU)
def test_ratio_1_and_the_own_reference(head_problem, backend, relative_rms):
    p = head_problem().to(torch.float32)
    old = linear_logprobs(
        p.hidden, p.weight, p.targets.masked_fill(~p.mask, -100), bias=p.bias,
        workspace_mb=WORKSPACE_MB, backend=backend,
    ).logprobs  # fmt: skip
    p.old_logprobs.copy_(old)
    own = {"ref_hidden": p.hidden, "ref_weight": p.weight, "ref_bias": p.bias}
    grads = []
    for spec in (PolicyLossSpec(kl_coef=0.5), PolicyLossSpec(loss="reinforce")):
        out, grad = fused(p, spec, backend=backend, **own)
        assert out.stats.kl == 0
        # Triton's two ops multiply with different kernels.
        assert abs(out.stats.ratio - 1) <= (1e-6 if backend == "triton" else 0)
        grads.append(grad)
    for x, y in zip(*grads, strict=True):
        assert relative_rms(x, y) < 1e-6


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_padding_microbatches_and_order_change_nothing(
    head_problem, backend, relative_rms, aggregation
):
    p = head_problem(20).to(torch.float32)
    spec = PolicyLossSpec(kl_coef=0.1, entropy_coef=0.05, aggregation=aggregation)
    ids = torch.arange(20) // 5
    num_items = {"token_mean": int(p.mask.sum()), "sequence_mean": 4, "constant": 20}[aggregation]
    whole = flat(fused(p, spec, backend=backend, sequence_ids=ids, num_items=num_items))

    def close(result):
        return all(relative_rms(x, y) < 2e-6 for x, y in zip(flat(result), whole, strict=True))

    if aggregation != "constant":
        assert close(fused(p, spec, backend=backend, sequence_ids=ids))
    parts = [
        flat(
            fused(
                p.rows(s), spec, backend=backend, sequence_ids=ids[s],
                num_items=torch.tensor(num_items),
            )
        )
        for s in (slice(0, 5), slice(5, 20))
    ]  # fmt: skip
    for first, second, one in zip(*parts, whole, strict=True):
        joined = torch.cat((first, second)) if len(first.shape) == 2 and len(first) == 5 else None
        got = first + second if joined is None else joined
        assert relative_rms(got, one) < 2e-6
    assert relative_rms(parts[0][0], whole[0]) > 1e-3
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    out, grads = fused(
        p.rows(order), spec, backend=backend, sequence_ids=ids[order], num_items=num_items
    )
    assert close((out, (grads[0][order.argsort()], *grads[1:])))

    # Padding that holds NaN and impossible targets, as it may.
    padded = p.rows(torch.cat((torch.arange(20), torch.zeros(7, dtype=torch.long))))
    for x in (padded.hidden, padded.ref_hidden, padded.old_logprobs, padded.advantages):
        x[20:] = torch.nan
    padded.targets[20:], padded.mask[20:] = -7, False
    padded_ids = torch.cat((ids, torch.full((7,), 99)))
    out, grads = fused(padded, spec, backend=backend, sequence_ids=padded_ids, num_items=num_items)
    assert grads[0][20:].eq(0).all()
    assert close((out, (grads[0][:20], *grads[1:])))


class Products(OperatorMode):
    """Rows that went through matrix products with a vocabulary-sized side."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.logits, self.hidden, self.weight = vocab, 0, 0, 0

    def observe(self, func, args, kwargs):
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "mm":
            self.logits += args[0].shape[0] * result.shape[1]
        elif name == "addmm_" and args[1].stride(-1) == 1:
            self.hidden += args[1].shape[0] * args[1].shape[1]
        elif name == "addmm_":
            self.weight += args[1].shape[1] * args[1].shape[0]
        return result

    def rows(self):
        """Rows with logits, with a hidden gradient, with a weight gradient."""
        return self.logits / self.vocab, self.hidden / self.vocab, self.weight / self.vocab


@cpu_only
def test_products_only_for_what_is_needed(head_problem):
    p = head_problem(20).to(torch.float32)
    p.advantages[[2, 3]] = 0.0
    p.old_logprobs[4], p.advantages[4] = -100.0, 1.0  # clipped
    none = {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
    valid = int(p.mask.sum())

    def count(spec, requires=("hidden", "weight"), grad=True, **options):
        hidden, weight = (
            getattr(p, name).detach().requires_grad_(name in requires)
            for name in ("hidden", "weight")
        )
        with torch.set_grad_enabled(grad), Products(1003) as products:
            result = linear_policy_loss(
                hidden, weight, p.targets, p.old_logprobs, p.advantages, p.mask, spec, bias=p.bias,
                workspace_mb=WORKSPACE_MB, backend="cpu", **{**none, **options},
            )  # fmt: skip
            if grad and requires:
                result.loss.backward()
        return products.rows(), result

    ppo, regularised = PolicyLossSpec(), PolicyLossSpec(kl_coef=0.1)
    (logits, hidden, weight), out = count(ppo)
    clipped = round(float(out.stats.clipfrac) * valid)
    assert logits == valid and hidden == weight == valid - clipped - 2
    assert clipped >= 1
    given = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
    assert count(regularised, **given)[0] == (2 * valid, valid, valid)
    assert count(regularised, requires=("hidden",), **given)[0] == (2 * valid, valid, 0)
    assert count(ppo, requires=("weight",))[0] == (valid, 0, valid - clipped - 2)
    assert count(ppo, requires=())[0] == (valid, 0, 0)
    (logits, hidden, weight), out = count(ppo, grad=False)
    assert (logits, hidden, weight) == (valid, 0, 0) and not out.loss.requires_grad


@cpu_only
def test_a_row_without_signal_gets_exactly_0(head_problem):
    p = head_problem(20).to(torch.float32)
    p.advantages[2] = 0.0
    _, (hidden, *_) = fused(p, PolicyLossSpec(), backend="cpu")
    assert hidden[2].eq(0).all() and hidden[~p.mask].eq(0).all()
    assert hidden.ne(0).any(-1).sum() > 5


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_only_where_they_are_wanted(head_problem, backend, relative_rms):
    p, spec = head_problem().to(torch.float32), SPECS["ppo with everything"]
    everything = fused(p, spec, backend=backend)[1]
    names = ("hidden", "weight", "bias")
    for i, name in enumerate(names):
        (alone,) = fused(p, spec, backend=backend, requires=(name,))[1]
        assert relative_rms(alone, everything[i]) < 1e-6
    out, _ = fused(p, spec, backend=backend, requires=())
    assert not out.loss.requires_grad and not any(x.requires_grad for x in out.stats)


@pytest.mark.parametrize("backend", ON_CPU)
def test_tied_weights_scaled_losses_and_low_precision(head_problem, backend, relative_rms):
    p = head_problem().to(torch.float32)

    def tied(dtype, backend, factor):
        weight = p.weight.to(dtype).detach().requires_grad_()
        hidden = weight[p.targets] * 0.5 + p.hidden.to(dtype)
        out = linear_policy_loss(
            hidden, weight, p.targets, p.old_logprobs.to(dtype), p.advantages.to(dtype), p.mask,
            PolicyLossSpec(loss="reinforce"), workspace_mb=WORKSPACE_MB, backend=backend,
        )  # fmt: skip
        (factor * out.loss).backward()
        return weight.grad

    truth = tied(torch.float64, "reference", 3.0)
    assert relative_rms(tied(torch.float32, backend, 3.0), truth) < 2e-6
    low = tied(torch.bfloat16, backend, 3.0)
    assert low.dtype == torch.bfloat16 and relative_rms(low, truth) < 2e-2
    assert relative_rms(tied(torch.float32, backend, 2.9), truth) > 2e-2


@pytest.mark.parametrize("backend", ON_CPU)
def test_empty_single_and_fully_masked_input(head_problem, backend):
    p = head_problem().to(torch.float32)
    for rows in (slice(0, 0), slice(0, 1)):
        out, grads = fused(p.rows(rows), PolicyLossSpec(), backend=backend)
        assert out.loss.isfinite() and grads[0].shape == p.hidden[rows].shape
    p.mask.fill_(False)
    out, grads = fused(p, PolicyLossSpec(), backend=backend)
    assert out.loss == 0 and all(x.eq(0).all() for x in grads)


@pytest.mark.parametrize("backend", ON_CPU)
def test_leading_dimensions(head_problem, backend):
    p = head_problem(12).to(torch.float32)
    spec = PolicyLossSpec(aggregation="sequence_mean")
    none = {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
    expected, (grad, *_) = fused(
        p, spec, backend=backend, sequence_ids=torch.arange(12) // 4, **none
    )
    hidden = p.hidden.reshape(3, 4, -1).clone().requires_grad_()
    shaped = (x.reshape(3, 4) for x in (p.targets, p.old_logprobs, p.advantages, p.mask))
    out = linear_policy_loss(
        hidden, p.weight, *shaped, spec, bias=p.bias, workspace_mb=WORKSPACE_MB, backend=backend
    )
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(hidden.grad.reshape(12, -1), grad)


@cpu_only
def test_bits_repeat(head_problem):
    p, spec = head_problem(40).to(torch.float32), SPECS["ppo with everything"]
    first, second = (flat(fused(p, spec, backend="cpu")) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
