"""From scores to per-token rewards (docs/math.md, section 4).

The KL to the reference enters the reward in one of two forms. `k1`, sampled: each token carries its
own log-ratio. `exact`: each token carries the KL of the state that it leads to, and the KL of the
state that it was drawn in goes into the loss, where its gradient is exact. `k2` and `k3` live in
the loss alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eos_penalty", "kl_reward", "next_valid", "overlong_penalty", "place_scores"]


def eos_penalty(scores: Tensor, ended: Tensor, penalty: float | None) -> Tensor:
    """``scores`` [B] with ``penalty`` taken off where no end-of-sequence token was sampled."""
    return scores if penalty is None else scores - penalty * (~ended).to(scores.dtype)


def overlong_penalty(scores: Tensor, lengths: Tensor, limit: int, share: float) -> Tensor:
    """`scores - ((lengths - (1 - share) * limit) / (share * limit)).clamp(0, 1)`.

    scores: [B]. lengths: [B] response tokens. A response that fills ``limit`` loses 1; share 0 is
    no penalty. Source: Yu et al. 2025 (DAPO), eq. 13.
    """
    if share == 0:
        return scores
    room = share * limit
    return scores - ((lengths - (limit - room)) / room).clamp(0, 1).to(scores.dtype)


def kl_reward(
    estimator: str,
    kl_coef: float,
    gamma: float,
    *,
    kl: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
) -> Tensor:
    """The part of the per-token reward that is not the score.

        exact:  -gamma · kl_coef · KL[t+1]       k1:  -kl_coef · (old_logprobs - ref_logprobs)[t]

    Args:
        estimator: "exact", "k1", or "k2" and "k3" (zero: their KL is in the loss).
        kl, old_logprobs, ref_logprobs: [B, T]; ref_logprobs is for k1.
        mask: [B, T] bool, True on response tokens. KL after the last of them is 0.

    Returns:
        [B, T], 0 where mask is False.
    """
    if estimator == "exact":
        return -gamma * kl_coef * next_valid(kl, mask)
    if estimator == "k1":
        assert ref_logprobs is not None, "k1 compares with the reference's log-probabilities"
        return torch.where(mask, -kl_coef * (old_logprobs - ref_logprobs), 0.0)
    return torch.zeros_like(kl)


def next_valid(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` at the next position that the mask keeps; 0 after the last. [B, T] -> [B, T]."""
    result = torch.zeros_like(x)
    carried = x.new_zeros(x.shape[0])
    for t in reversed(range(x.shape[1])):
        result[:, t] = torch.where(mask[:, t], carried, 0.0)
        carried = torch.where(mask[:, t], x[:, t], carried)
    return result


def place_scores(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Add each sequence's score to its last response token. [B, T], [B], [B, T] -> [B, T]."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, steps, -1).amax(-1, keepdim=True)
    return rewards + torch.where((steps == last) & mask, scores[:, None], 0.0)
