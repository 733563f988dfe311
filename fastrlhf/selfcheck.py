"""Identities that hold in every correct run, checked while it runs (docs/math.md, section 5.13).

A check raises `SelfCheckError` where the identity is broken; the figures are metrics.
"""

from __future__ import annotations

import math

import torch

from fastrlhf_kernels import LossStats

from .errors import SelfCheckError
from .types import Experience, Rollout

__all__ = ["check_experience", "check_first_minibatch"]

# How far recomputed log-probabilities may lie from those of scoring, by the weights' precision.
RATIO_SLACK = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# How far sampling's log-probabilities may lie from scoring's: other shapes, other rounding. Of
# logits: a temperature below 1 widens it.
ROLLOUT_SLACK = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.5}
# The share of the tokens it is for: in 16 bits one of thousands lies far off by rounding alone.
ROLLOUT_SHARE = {torch.bfloat16: 0.99, torch.float16: 0.99}


def check_experience(
    experience: Experience,
    rollout: Rollout,
    *,
    untrained: bool,
    dtype: torch.dtype,
    temperature: float = 1.0,
    engine: str = "fastrlhf",
) -> dict[str, float]:
    """KL and entropy are not negative, KL is 0 before the first step, sampling agrees.

    Args:
        untrained: whether no step has been taken, so that policy and reference are one model.
        dtype: of the model's weights.
        temperature: by which logits were divided.
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
    rank = math.ceil(ROLLOUT_SHARE.get(dtype, 1.0) * len(gaps))
    gap = gaps.kthvalue(rank).values
    near = gaps.isfinite().all() and gap <= rollout_slack(dtype, temperature)
    if engine == "fastrlhf" and not near:
        raise SelfCheckError(
            f"log-probabilities of sampling and scoring differ by {gap:.3g}: padding, positions, "
            "temperature or adapters are not the same in both"
        )
    return {
        "rollout/logprob_gap_mean": float(gaps.mean()),
        "rollout/logprob_gap_max": float(gaps.max()),
    }


def rollout_slack(dtype: torch.dtype, temperature: float) -> float:
    """How far log-probabilities of sampling and scoring may lie apart."""
    return ROLLOUT_SLACK.get(dtype, 1e-2) / min(1.0, temperature)


def check_first_minibatch(
    stats: LossStats,
    dtype: torch.dtype,
    *,
    alike: bool = True,
    temperature: float = 1.0,
) -> None:
    """Before the first optimizer step on a rollout the policy is the one that was scored.

    Args:
        dtype: of the model's weights.
        alike: whether that was by the update's own microbatches, and not by sampling or by others.
        temperature: by which logits were divided.
    """
    ratio, clipfrac, approx_kl = float(stats.ratio), float(stats.clipfrac), float(stats.approx_kl)
    if not alike:
        check_rounded(ratio, approx_kl, rollout_slack(dtype, temperature))
        return
    # Errors that cancel in the mean ratio cannot in approx_kl: its terms are half their squares.
    slack = RATIO_SLACK.get(dtype, 1e-4)
    # Written so that NaN fails too.
    if not (abs(ratio - 1) <= slack and approx_kl <= slack**2 and clipfrac == 0):
        raise SelfCheckError(
            f"the first minibatch has ratio {ratio:.6f}, approx_kl {approx_kl:.3g}, clipfrac "
            f"{clipfrac:.3g} instead of 1, 0, 0: scoring and update compute different things"
        )


def check_rounded(ratio: float, approx_kl: float, slack: float) -> None:
    """Where the old log-probabilities are another forward's, they lie within its ``slack``.

    A token whose log-ratio is s at most has a ratio of exp(s) at most, and as its part of approx_kl
    exp(s) - 1 - s; so have the means. A token may be clipped then: what was sampled in another
    rounding is, for the update, of another policy.
    """
    most = math.expm1(slack)
    if not (abs(ratio - 1) <= most and approx_kl <= most - slack):
        raise SelfCheckError(
            f"the first minibatch has ratio {ratio:.6f} and approx_kl {approx_kl:.3g}, and "
            f"another forward's rounding allows 1 ± {most:.3g} and {most - slack:.3g}: sampling or "
            "scoring and update compute different things; see whether old_logprobs: scored passes"
        )
