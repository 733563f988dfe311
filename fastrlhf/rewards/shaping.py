"""From scores to per-token rewards (docs/math.md, section 4).

The KL to the reference enters the reward in one of two forms. `k1`, sampled: each token carries its
own log-ratio. `exact`: each token carries the KL of the state that it leads to, and the KL of the
state that it was drawn in goes into the loss, where its gradient is exact. `k2` and `k3` live in
the loss alone.

Scores of several objectives become one: each is scaled by itself, then they are added with their
weights (docs/math.md, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "ObjectiveShaper",
    "RunningMoments",
    "eos_penalty",
    "kl_reward",
    "log_scaled",
    "next_valid",
    "overlong_penalty",
    "place_scores",
    "weighted_sum",
]


def log_scaled(scores: Tensor) -> Tensor:
    """`sign(scores) * log(1 + |scores|)`."""
    return scores.sign() * scores.abs().log1p()


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum of weights · scores, [B, K] -> [B]. An objective that is NaN adds nothing; all: NaN."""
    total = (scores * torch.tensor(weights, dtype=scores.dtype, device=scores.device)).nansum(-1)
    return total.masked_fill(scores.isnan().all(-1), torch.nan)


class RunningMoments:
    """Mean and variance of all scores so far, each objective for itself.

    Batches are merged by Chan et al. 1979 (Welford's method for more than one at a time), in
    float64, so that the moments are those of all scores at once.
    """

    def __init__(self, objectives: int):
        self.count, self.mean, self.m2 = (
            torch.zeros(objectives, dtype=torch.float64) for _ in range(3)
        )

    def update(self, scores: Tensor) -> None:
        """Take in [B, K] scores; NaN is none."""
        scores = scores.detach().cpu().double()
        there = ~scores.isnan()
        n = there.sum(0).double()
        mean = scores.nan_to_num(0.0).sum(0) / n.clamp(min=1)
        m2 = torch.where(there, (scores - mean) ** 2, 0.0).sum(0)
        total = (self.count + n).clamp(min=1)
        difference = mean - self.mean
        self.m2 += m2 + difference**2 * self.count * n / total
        self.mean += difference * n / total
        self.count += n

    @property
    def std(self) -> Tensor:
        """[K] float64; 1 where fewer than two different scores were seen."""
        variance = self.m2 / (self.count - 1).clamp(min=1)
        return torch.where(variance > 0, variance, 1.0).sqrt()

    def normalize(self, scores: Tensor) -> Tensor:
        """`(scores - mean) / std`, [B, K]."""
        mean, std = (x.to(scores.device, scores.dtype) for x in (self.mean, self.std))
        return (scores - mean) / std

    def state_dict(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("count", "mean", "m2")}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        for name in ("count", "mean", "m2"):
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))


class ObjectiveShaper:
    """From the scores of K objectives to one score: log, running normalisation, clip, weights.

    Args:
        scaling: "log" takes `log_scaled` first.
        normalization: "running" then shifts and scales by the moments of all scores of training so
            far, these included.
        clip: then bounds each objective's absolute value.
    """

    def __init__(
        self,
        *,
        scaling: Literal["none", "log"] = "none",
        normalization: Literal["none", "running"] = "none",
        clip: float | None = None,
    ):
        self.scaling, self.normalization, self.clip = scaling, normalization, clip
        self.moments: RunningMoments | None = None

    @property
    def changes(self) -> bool:
        """Whether anything but the weights is applied."""
        return self.scaling != "none" or self.normalization != "none" or self.clip is not None

    def __call__(self, scores: Tensor, weights: Sequence[float]) -> Tensor:
        """[B, K] scores, NaN where there is none, and K weights -> [B]."""
        if self.scaling == "log":
            scores = log_scaled(scores)
        if self.normalization == "running":
            # Where nothing was judged, not even the number of objectives is known for sure.
            if self.moments is None or not self.moments.count.any():
                self.moments = RunningMoments(scores.shape[1])
            self.moments.update(scores)
            scores = self.moments.normalize(scores)
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        return weighted_sum(scores, weights)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON."""
        return {"moments": None if self.moments is None else self.moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.moments = None
        if state["moments"] is not None:
            self.moments = RunningMoments(len(state["moments"]["count"]))
            self.moments.load_state_dict(state["moments"])


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
