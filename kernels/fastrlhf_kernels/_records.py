"""The records that go into the ops and come out of them.

A loss is named and weighted by one frozen `PolicyLossSpec`; what it cannot mean is refused when the
spec is made, so that no op has to check it again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

LOSSES = ("ppo_clip", "ppo_kl", "cispo", "gspo", "reinforce")
KL_ESTIMATORS = ("exact", "k2", "k3")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")

TABLE_COLUMNS = 8
"""float32 per row: max and log-sum of the logits, the same of the reference, logprob, entropy, kl,
reference logprob"""
LOGPROB, ENTROPY, KL, REF_LOGPROB = 4, 5, 6, 7
EXTRA_STATS = ("mean_logits", "is_top1", "log_sum_sq_probs")
"""statistics without gradient, given where asked for by name"""


class TokenLogprobs(NamedTuple):
    """What the vocabulary knows about each token; shapes are those of `targets`.

    float32, or float64 for float64 inputs (reference backend only). Ignored rows hold 0.
    """

    logprobs: Tensor
    """[N] log-softmax(z/τ) at the target, nats, ≤ 0"""
    entropy: Tensor
    """[N] entropy of softmax(z/τ), nats, ≥ 0"""
    kl: Tensor | None = None
    """[N] exact KL to the reference over the whole vocabulary, nats, ≥ 0; None without one"""
    extra: Mapping[str, Tensor] = MappingProxyType({})
    """the statistics asked for by name in `stats`, each [N], without gradient"""


@dataclass(frozen=True)
class PolicyLossSpec:
    """Which policy loss, with which coefficients (docs/math.md, section 3).

    Raises ValueError, naming the field and what it allows, for what is unknown, negative or NaN.
    """

    loss: str = "ppo_clip"
    """"ppo_clip": −min(r·A, clip(r, 1−low, 1+high)·A); "ppo_kl": −r·A, with old_kl_coef; "cispo":
    −sg(clip(r, 1−low, 1+high))·A·logprob; "gspo": ppo_clip with the sequence's geometric mean of r
    in the place of r (its clip ranges are about 3e-4 and 4e-4); "reinforce": −logprob·A"""
    cliprange_low: float = 0.2
    """the ratio is clipped below at 1 − cliprange_low"""
    cliprange_high: float = 0.2
    """the ratio is clipped above at 1 + cliprange_high"""
    dual_clip: float | None = None
    """for A < 0 the loss of a token is at most −dual_clip·A; above 1, or None for no bound"""
    kl_coef: float = 0.0
    """weight of KL(policy, reference) in the loss"""
    kl_estimator: str = "exact"
    """"exact" over the vocabulary, or "k2" / "k3" of the sampled token"""
    old_kl_coef: float = 0.0
    """with "ppo_kl": weight of r − 1 − log r, which estimates KL(old policy‖policy)"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus, which is subtracted from the minimised loss"""
    aggregation: str = "token_mean"
    """"token_mean", "sequence_mean", or "constant" (divide by `num_items` as given)"""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}: allowed are {', '.join(LOSSES)}")
        if self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator='k1' in a loss has a gradient that is 0 on average; "
                f"allowed: {', '.join(KL_ESTIMATORS)} (k1 belongs in the reward)"
            )
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r}: allowed are {', '.join(KL_ESTIMATORS)}"
            )
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation={self.aggregation!r}: allowed are {', '.join(AGGREGATIONS)}"
            )
        for name in (
            "cliprange_low", "cliprange_high", "kl_coef", "old_kl_coef", "entropy_coef",
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r}: allowed are finite numbers ≥ 0")
        bound = self.dual_clip
        if bound is not None and not (math.isfinite(bound) and bound > 1):
            raise ValueError(f"dual_clip={bound!r}: allowed are None and finite numbers > 1")
        if bound is not None and self.loss != "ppo_clip":
            raise ValueError(f"dual_clip={bound!r}: allowed with loss='ppo_clip' only")
        if self.old_kl_coef and self.loss != "ppo_kl":
            raise ValueError(f"old_kl_coef={self.old_kl_coef!r}: allowed with loss='ppo_kl' only")


class LossStats(NamedTuple):
    """Detached 0-dim tensors: sums over this call's tokens with the weights the loss gives them.

    With "token_mean" that is the sum over `num_items`, so that the outputs of microbatches add up
    to the mean of the minibatch. NaN stands where the call was not given what a statistic takes.
    """

    approx_kl: Tensor
    """r − 1 − log r"""
    clipfrac: Tensor
    """share of tokens with A > 0 and r > 1 + cliprange_high, or A < 0 and r < 1 − cliprange_low"""
    ratio: Tensor
    """r = exp(logprob − old_logprob); with "gspo" its geometric mean over the sequence"""
    entropy: Tensor
    """entropy, nats"""
    kl: Tensor
    """KL to the reference, nats: exact where the call has it, else the spec's k2, or k3"""


class ValueStats(NamedTuple):
    """Detached 0-dim tensors; microbatches add as in `LossStats`."""

    clipfrac: Tensor
    """share of tokens whose clipped error is the larger one"""


StatsT = TypeVar("StatsT", LossStats, ValueStats)


class LossOutput(NamedTuple, Generic[StatsT]):
    """A loss to call `.backward()` on, and its statistics."""

    loss: Tensor
    """0-dim, differentiable"""
    stats: StatsT


def row_offsets(x: Tensor) -> Tensor:
    """Where each row of x [..., V] starts, in elements from its first; [N] for any strides."""
    offsets = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        offsets = offsets[..., None] + stride * torch.arange(size, device=x.device)
    return offsets.reshape(-1)
