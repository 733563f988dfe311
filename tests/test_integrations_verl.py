"""verl's signatures as published in verl 0.9.1 on PyPI, and what our functions do behind them.

Where verl itself is installed, our policy loss runs beside its own; elsewhere a package of that
name with the published functions stands in for it.
"""

import inspect
import sys
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from fastrlhf.integrations import verl as integration
from fastrlhf_kernels import PolicyLossSpec, linear_logprobs

# verl/utils/kernel/linear_cross_entropy.py: LinearCrossEntropy.forward, without ctx.
LINEAR_CROSS_ENTROPY = {
    "hidden": inspect.Parameter.empty,
    "weight": inspect.Parameter.empty,
    "labels": inspect.Parameter.empty,
    "temperature": 1.0,
    "reduction": "none",
    "dist_process_group": None,
}
# verl/trainer/ppo/core_algos.py: compute_policy_loss_vanilla.
POLICY_LOSS = {
    "old_log_prob": inspect.Parameter.empty,
    "log_prob": inspect.Parameter.empty,
    "advantages": inspect.Parameter.empty,
    "response_mask": inspect.Parameter.empty,
    "loss_agg_mode": "token-mean",
    "config": None,
    "rollout_is_weights": None,
}
MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)  # fmt: skip
GLOBAL = dict(dp_size=2, batch_num_tokens=50, global_batch_size=8, loss_scale_factor=16)
INSTALLED = find_spec("verl") is not None


def defaults(function) -> dict[str, object]:
    return {name: x.default for name, x in inspect.signature(function).parameters.items()}


class ActorConfig:
    """What a policy loss reads of verl's ActorConfig."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.1, 0.3

    def __init__(self, **info):
        self.global_batch_info = info

    def get(self, name, default):
        return {"clip_ratio_c": 2.5}.get(name, default)


class Published(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
    ): ...


@pytest.fixture
def verl(monkeypatch) -> dict[str, ModuleType]:
    """A stand-in with the symbols that the adapter touches."""
    modules = {}
    for name in (
        "verl", "verl.utils", "verl.utils.kernel", "verl.utils.kernel.linear_cross_entropy",
        "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos",
        "verl.models.mcore.model_forward_fused",
    ):  # fmt: skip
        modules[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    kernel = modules["verl.utils.kernel.linear_cross_entropy"]
    kernel.LinearCrossEntropy = Published
    kernel.linear_cross_entropy = Published.apply
    # As `from ... import linear_cross_entropy` binds it.
    modules[
        "verl.models.mcore.model_forward_fused"
    ].linear_cross_entropy = kernel.linear_cross_entropy
    algorithms = modules["verl.trainer.ppo.core_algos"]
    algorithms.POLICY_LOSS_REGISTRY = {"vanilla": lambda: None}
    algorithms.register_policy_loss = lambda name: (
        lambda function: algorithms.POLICY_LOSS_REGISTRY.setdefault(name, function)
    )
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.1")
    yield modules
    integration.unpatch()


def test_signatures_are_the_published_ones():
    assert defaults(integration.linear_cross_entropy) == LINEAR_CROSS_ENTROPY
    assert defaults(integration.VerlPolicyLoss()) == POLICY_LOSS


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy(head_problem, reduction):
    problem = head_problem(12).to(torch.float32)
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    want = linear_logprobs(hidden, weight, problem.targets, temperature=0.8)
    # verl passes a [1, N, D] row of packed sequences, by position.
    logprobs, entropy = integration.linear_cross_entropy(
        hidden[None], weight, problem.targets[None], 0.8, reduction, None
    )
    reduced = want.logprobs if reduction == "none" else getattr(want.logprobs, reduction)()
    assert torch.equal(logprobs, reduced) and torch.equal(entropy, want.entropy)
    assert logprobs.dtype == torch.float32 and entropy.shape == (12,)
    for a, b in zip(
        torch.autograd.grad(logprobs.sum() + entropy.sum(), [hidden, weight]),
        torch.autograd.grad(reduced.sum() + want.entropy.sum(), [hidden, weight]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_what_is_refused(head_problem, monkeypatch):
    problem = head_problem().to(torch.float32)
    given = (problem.hidden, problem.weight, problem.targets, 1.0)
    with pytest.raises(ValueError, match="reduction='max': allowed are none, sum, mean"):
        integration.linear_cross_entropy(*given, "max")
    monkeypatch.setattr(integration, "get_world_size", lambda group: 4)
    with pytest.raises(RuntimeError, match=r"splits it over 4.*tensor_model_parallel_size=1"):
        integration.linear_cross_entropy(*given, "none", object())
    monkeypatch.setattr(integration, "get_world_size", lambda group: 1)
    integration.linear_cross_entropy(*given, "none", object())
    for spec in (PolicyLossSpec(kl_coef=0.1), PolicyLossSpec(entropy_coef=0.1)):
        with pytest.raises(ValueError, match="verl adds KL and entropy"):
            integration.VerlPolicyLoss(spec)
    tokens = torch.zeros(1, 2)
    for mode, info, message in (
        ("mean", {}, "not one of verl 0.9's"),
        ("token-mean", dict(dp_size=2), "needs batch_num_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            integration.VerlPolicyLoss()(
                tokens, tokens, tokens, tokens, mode, config=ActorConfig(**info)
            )


def eager(old, new, advantages, mask, mode, config, weights):
    """verl's loss as its documentation of the modes says it, with whole matrices."""
    ratio = (new - old).exp()
    bounded = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.9, 1.3))
    loss = torch.where(advantages < 0, bounded.minimum(-advantages * 2.5), bounded)
    loss = (loss if weights is None else loss * weights) * mask
    info = config.global_batch_info
    ranks = info.get("dp_size", 1)
    if mode == "token-sum":
        return loss.sum() * ranks
    if mode == "token-mean":
        return loss.sum() / info.get("batch_num_tokens", mask.sum()) * ranks
    sums = loss.sum(-1)
    if mode == "seq-mean-token-mean":
        sums = sums / mask.sum(-1).clamp(min=1)
    total = sums.sum() / info.get("global_batch_size", mask.any(-1).sum()) * ranks
    norm = mode == "seq-mean-token-sum-norm"
    return total / info.get("loss_scale_factor", mask.shape[-1]) if norm else total


def tokens(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    old, new, advantages = (
        torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mask = torch.rand(4, 9, generator=generator) > 0.3
    mask[2] = False
    weights = 2 * torch.rand(4, 9, generator=generator, dtype=torch.float64)
    return old, new.requires_grad_(), advantages, mask, weights


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_in_every_mode(mode, info, weighted):
    old, new, advantages, mask, weights = tokens()
    weights = weights if weighted else None
    config = ActorConfig(**info)
    loss, metrics = integration.VerlPolicyLoss()(
        old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask,
        loss_agg_mode=mode, config=config, rollout_is_weights=weights,
    )  # fmt: skip
    truth = eager(old, new, advantages, mask, mode, config, weights)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (loss, truth)))
    log_ratio = (new - old)[mask]
    assert metrics["actor/ppo_kl"] == pytest.approx(-log_ratio.mean().item())
    ratio, signs = log_ratio.exp(), advantages[mask]
    clipped = ((signs > 0) & (ratio > 1.3)) | ((signs < 0) & (ratio < 0.9))
    assert metrics["actor/pg_clipfrac"] == pytest.approx(clipped.double().mean().item())
    bounded = (signs < 0) & (ratio > 2.5)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(bounded.double().mean().item())


def test_a_spec_of_ones_own():
    old, new, advantages, mask, _ = tokens()
    loss, _ = integration.VerlPolicyLoss(PolicyLossSpec(loss="reinforce"))(
        old, new, advantages, mask, config=ActorConfig()
    )
    torch.testing.assert_close(loss, -(new * advantages)[mask].mean())


def test_patch_and_unpatch(verl):
    kernel = verl["verl.utils.kernel.linear_cross_entropy"]
    early = verl["verl.models.mcore.model_forward_fused"]
    original = kernel.linear_cross_entropy
    with integration.patch():
        assert kernel.linear_cross_entropy is integration.linear_cross_entropy
        assert early.linear_cross_entropy is integration.linear_cross_entropy
        # A module that verl loads meanwhile binds ours.
        late = ModuleType("verl.models.mcore.model_forward_1f1b_overlap")
        late.linear_cross_entropy = kernel.linear_cross_entropy
        sys.modules[late.__name__] = late
    del sys.modules[late.__name__]
    assert kernel.linear_cross_entropy is early.linear_cross_entropy is original
    assert late.linear_cross_entropy is original


def test_register(verl):
    registry = verl["verl.trainer.ppo.core_algos"].POLICY_LOSS_REGISTRY
    loss = integration.register()
    assert registry["fastrlhf_ppo_clip"] is loss
    integration.register()
    integration.register("mine", PolicyLossSpec(cliprange_high=0.28))
    assert registry["mine"].spec.cliprange_high == 0.28
    with pytest.raises(ValueError, match="verl has a policy loss 'vanilla' of its own"):
        integration.register("vanilla")


@pytest.mark.parametrize("found", ["0.8.2", "0.10.0", "1.0"])
def test_other_versions_are_refused(verl, found, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    for call in (integration.patch, integration.register):
        with pytest.raises(ImportError, match=rf"found verl {found}.*0\.9\.x \(tried with 0\.9\.1"):
            call()


@pytest.mark.skipif(not INSTALLED, reason="verl is not installed")
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_beside_verl_itself(mode, info):
    from verl.trainer.ppo import core_algos
    from verl.utils.kernel import linear_cross_entropy as kernel
    from verl.workers.config import FSDPActorConfig

    published = defaults(kernel.LinearCrossEntropy.forward)
    assert {k: v for k, v in published.items() if k != "ctx"} == LINEAR_CROSS_ENTROPY
    assert defaults(core_algos.compute_policy_loss_vanilla) == POLICY_LOSS
    original = kernel.linear_cross_entropy
    with integration.patch():
        assert kernel.linear_cross_entropy is integration.linear_cross_entropy
    assert kernel.linear_cross_entropy is original
    integration.register()
    old, new, advantages, mask, weights = tokens()
    config = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    config.global_batch_info.update(info)
    results = [
        core_algos.get_policy_loss_fn(name)(
            old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask,
            loss_agg_mode=mode, config=config, rollout_is_weights=weights,
        )
        for name in ("fastrlhf_ppo_clip", "vanilla")
    ]  # fmt: skip
    (ours, our_metrics), (theirs, their_metrics) = results
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (ours, theirs)))
    assert our_metrics == pytest.approx(their_metrics, abs=1e-6)
