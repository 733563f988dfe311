"""Our fused head and our policy loss under verl.

`patch()` puts `linear_cross_entropy` in the place of verl's Triton kernel of that name. verl calls
it where `actor_rollout_ref.model` has `use_fused_kernels=True` and
`fused_kernel_options.impl_backend=triton`; with `torch`, its default, it uses `FusedLinearForPPO`,
patched or not. `register()` makes our policy loss one that `actor_rollout_ref.actor` can name as
`policy_loss.loss_mode`. Workers are processes of their own: call both from a module that the
environment variable `VERL_USE_EXTERNAL_MODULES` names.

Supports verl 0.9.x, tried with 0.9.1 on a CPU: the policy loss beside verl's own, and that the
kernel's symbol is replaced and restored. Not yet run: a training run, and the op beside verl's
kernel, which needs a GPU. Refused: a vocabulary that is split over processes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_world_size

from fastrlhf_kernels import PolicyLossSpec, linear_logprobs, policy_loss

from . import Applied, Package, Patch, Replacement

__all__ = ["VerlPolicyLoss", "linear_cross_entropy", "patch", "register", "unpatch"]

VERL = Package("verl", series="0.9", tried=("0.9.1",))
REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`(logprobs, entropy)` of `linear_logprobs(hidden, weight, labels, temperature=temperature)`.

    hidden: [..., D]; weight: [V, D]; labels: [...] int64. As with verl's kernel, entropy is [N] and
    logprobs are [N] for the N flattened rows, or their sum or mean. float32, differentiable. Rows
    with label -100 give 0. Raises ValueError for another reduction, RuntimeError for a process
    group of more than one rank.
    """
    if reduction.lower() not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: allowed are {', '.join(REDUCTIONS)}")
    if dist_process_group is not None and get_world_size(dist_process_group) > 1:
        raise RuntimeError(
            "fastrlhf's linear_cross_entropy takes the whole vocabulary in one process, and this "
            f"group splits it over {get_world_size(dist_process_group)}: use "
            "tensor_model_parallel_size=1, or fastrlhf.integrations.verl.unpatch()"
        )
    with torch.autocast(hidden.device.type, enabled=False):
        found = linear_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            labels.reshape(-1),
            temperature=temperature,
        )
    logprobs = found.logprobs
    if reduction.lower() == "sum":
        logprobs = logprobs.sum()
    elif reduction.lower() == "mean":
        logprobs = logprobs.mean()
    return logprobs, found.entropy


@dataclass(frozen=True)
class VerlPolicyLoss:
    """`fastrlhf_kernels.policy_loss` with the call and the results of verl's policy losses.

    Entropy bonus and KL are verl's own terms, which it adds to this one. Deviation from verl's
    "vanilla": log-ratios are not clamped to ±20.
    """

    spec: PolicyLossSpec | None = None
    """None: PPO's clip with verl's clip_ratio_low, clip_ratio_high and clip_ratio_c"""

    def __post_init__(self) -> None:
        spec = self.spec
        if spec is not None and (spec.kl_coef or spec.old_kl_coef or spec.entropy_coef):
            raise ValueError(
                "verl adds KL and entropy to the policy loss itself: set actor.kl_loss_coef and "
                f"actor.entropy_coeff, and leave them 0 in the spec, got {spec}"
            )

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss and verl's metrics of it; tensors are [B, T], response_mask 1 = trains.

        rollout_is_weights ≥ 0 multiply the tokens' losses. config is verl's actor config. Raises
        ValueError for a loss_agg_mode that verl 0.9 does not have.
        """
        spec = self.spec or self._verls(config)
        mask = response_mask.bool()
        # A token's loss is linear in its advantage while the sign stays.
        weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
        aggregation, ranks, count = aggregate(mask, loss_agg_mode, config)
        spec = replace(spec, aggregation=aggregation)
        total, _ = policy_loss(log_prob, old_log_prob, weighted, mask, spec, num_items=1)
        with torch.no_grad():
            mean = replace(spec, aggregation="token_mean")
            stats = policy_loss(log_prob, old_log_prob, advantages, mask, mean).stats
            log_ratio = (log_prob - old_log_prob)[mask]
            bound = float("inf") if spec.dual_clip is None else spec.dual_clip
            bounded = (advantages[mask] < 0) & (log_ratio.exp() > bound)
            rows = max(log_ratio.numel(), 1)
            metrics = {
                "actor/pg_clipfrac": stats.clipfrac.item(),
                "actor/ppo_kl": -log_ratio.sum().item() / rows,
                "actor/pg_clipfrac_lower": bounded.sum().item() / rows,
            }
        return total * ranks / count, metrics

    @staticmethod
    def _verls(config: Any) -> PolicyLossSpec:
        low, high = config.clip_ratio_low, config.clip_ratio_high
        return PolicyLossSpec(
            cliprange_low=config.clip_ratio if low is None else low,
            cliprange_high=config.clip_ratio if high is None else high,
            dual_clip=config.get("clip_ratio_c", 3.0),
        )


def aggregate(mask: Tensor, mode: str, config: Any) -> tuple[str, int, int | Tensor]:
    """verl's loss_agg_mode: our aggregation, the ranks, and what the sum is divided by.

    verl averages gradients over its data-parallel ranks, so each rank's sum counts dp_size times.
    """
    given = {} if config is None else config.global_batch_info
    ranks = given.get("dp_size") or 1
    tokens, sequences = given.get("batch_num_tokens"), given.get("global_batch_size")
    if mode == "token-sum":
        return "constant", ranks, 1
    if mode == "token-mean":
        name, aggregation, count, own = "batch_num_tokens", "constant", tokens, mask.sum()
    elif mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        aggregation = "sequence_mean" if mode == "seq-mean-token-mean" else "constant"
        name, count, own = "global_batch_size", sequences, mask.any(-1).sum()
    else:
        raise ValueError(f"loss_agg_mode={mode!r}: not one of verl {VERL.series}'s")
    if count is None:
        if ranks > 1:
            raise ValueError(f"loss_agg_mode={mode!r} needs {name} when dp_size > 1")
        count = own.clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        count = count * (given.get("loss_scale_factor") or mask.shape[-1])
    return aggregation, ranks, count


def register(name: str = "fastrlhf_ppo_clip", spec: PolicyLossSpec | None = None) -> VerlPolicyLoss:
    """Make `actor.policy_loss.loss_mode=<name>` our policy loss with `spec`.

    spec: None takes PPO's clip with the clip ratios of verl's actor config. Its aggregation is not
    used: verl's loss_agg_mode says how. Raises ImportError for a verl that is missing or not 0.9.x,
    ValueError for the name of another loss and a spec with KL or entropy.
    """
    VERL.require()
    algorithms = import_module("verl.trainer.ppo.core_algos")
    existing = algorithms.POLICY_LOSS_REGISTRY.get(name)
    if existing is not None and not isinstance(existing, VerlPolicyLoss):
        raise ValueError(f"verl has a policy loss {name!r} of its own; choose another name")
    loss = VerlPolicyLoss(spec)
    algorithms.register_policy_loss(name)(loss)
    return loss


def _holders() -> Iterator[ModuleType]:
    # verl's Megatron models import the function by name when they are loaded.
    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and isinstance(module, ModuleType):
            yield module


def _replacements() -> list[Replacement]:
    VERL.require()
    home = import_module("verl.utils.kernel.linear_cross_entropy")
    names = inspect.signature(linear_cross_entropy).parameters
    VERL.expect("verl's LinearCrossEntropy", home.LinearCrossEntropy.forward, ("ctx", *names))
    original = home.linear_cross_entropy
    return [Replacement(_holders, "linear_cross_entropy", original, linear_cross_entropy)]


_PATCH = Patch(_replacements)


def patch() -> Applied:
    """Put our op in the place of verl's fused kernel, until `unpatch()` or in `with patch():`.

    Patching twice changes nothing. Raises ImportError for a verl that is missing or not 0.9.x.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Put verl's own function back; without `patch()`, change nothing."""
    _PATCH.undo()
