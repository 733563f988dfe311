"""Identities that hold in every correct run, checked while it runs (docs/math.md, section 5.13).

A check raises `SelfCheckError` where the identity is broken; the figures are metrics.
"""

from __future__ import annotations

import torch

from fastrlhf_kernels import LossStats

from .errors import SelfCheckError
from .types import Experience, Rollout

__all__ = ["check_experience", "check_first_minibatch"]

# How far recomputed log-probabilities may lie from those of scoring, by the weights' precision.
RATIO_SLACK = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# How far sampling's log-probabilities may lie from scoring's: other shapes, other rounding.
ROLLOUT_SLACK = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.5}


def check_experience(
    experience: Experience,
    rollout: Rollout,
    *,
    untrained: bool,
    dtype: torch.dtype,
    engine: str = "fastrlhf",
) -> dict[str, float]:
    """KL and entropy are not negative, KL is 0 before the first step, sampling agrees.

    Args:
        untrained: whether no step has been taken, so that policy and reference are one model.
        dtype: of the model's weights.
        engine: who sampled; the gap of one that is not ours is only told.
    """
    mask = experience.response_mask
    if not mask.any():
        raise SelfCheckError("no token of this rollout trains: every score was None")
    kl = experience.entropy.new_zeros(()) if experience.kl is None else experience.kl[mask]
    entropy = experience.entropy[mask]
    if not (kl.isfinite().all() and entropy.isfinite().all()):
        raise SelfCheckError("KL or entropy is not finite: the model's weights or logits are not")
    if kl.min() < 0 or entropy.min() < 0:
        raise SelfCheckError(f"KL ({kl.min():.3g}) or entropy ({entropy.min():.3g}) is negative")
    if untrained and kl.max() > 0:
        raise SelfCheckError(
            f"KL to the reference is {kl.max():.3g} before the first step; policy and reference "
            "must be the same model then"
        )
    gaps = (experience.old_logprobs - rollout.rollout_logprobs)[mask].abs()
    gap = gaps.max()
    if engine == "fastrlhf" and not gap <= ROLLOUT_SLACK.get(dtype, 1e-2):
        raise SelfCheckError(
            f"log-probabilities of sampling and scoring differ by {gap:.3g}: padding, positions, "
            "temperature or adapters are not the same in both"
        )
    return {"rollout/logprob_gap_mean": float(gaps.mean()), "rollout/logprob_gap_max": float(gap)}


def check_first_minibatch(stats: LossStats, dtype: torch.dtype) -> None:
    """Before the first optimizer step on a rollout the policy is the one that was scored."""
    ratio, clipfrac, approx_kl = float(stats.ratio), float(stats.clipfrac), float(stats.approx_kl)
    # Errors that cancel in the mean ratio cannot in approx_kl: its terms are half their squares.
    slack = RATIO_SLACK.get(dtype, 1e-4)
    # Written so that NaN fails too.
    if not (abs(ratio - 1) <= slack and approx_kl <= slack**2 and clipfrac == 0):
        raise SelfCheckError(
            f"the first minibatch has ratio {ratio:.6f}, approx_kl {approx_kl:.3g}, clipfrac "
            f"{clipfrac:.3g} instead of 1, 0, 0: scoring and update compute different things"
        )
