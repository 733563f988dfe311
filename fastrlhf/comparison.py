"""Whether one model is better than another on the same prompts, and how sure that is.

    win rate = mean(1[a > b] + ½·1[a = b])        difference = mean(a − b)

Intervals are the paired bootstrap's (Efron 1979; Koehn 2004): prompts are drawn again with
replacement, both models' scores of a prompt together, and the 2.5 and 97.5 % quantiles of the
figure over these draws are its bounds. They speak of other prompts of the same kind, not of another
training seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Comparison", "Interval", "compare", "mean_interval"]

DRAWS = 4000
# Counts that are held at a time: 2^20 of them and their draws are 16 MiB.
HELD = 2**20
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Scores of a policy and of its reference on the same prompts."""

    prompts: int  # that both were judged on
    win_rate: Interval
    policy: Interval
    reference: Interval
    difference: Interval


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of ``values`` with its bootstrap interval."""
    column = torch.tensor(values, dtype=torch.float64)
    return bootstrap(column[:, None], seed)[0]


def compare(
    policy: Sequence[float | None], reference: Sequence[float | None], seed: int = 0
) -> Comparison:
    """Compare scores prompt by prompt; a prompt that either was not judged on (None) is left out.

    Raises:
        ValueError: no prompt is left.
    """
    both = [
        (a, b) for a, b in zip(policy, reference, strict=True) if a is not None and b is not None
    ]
    if not both:
        raise ValueError("no prompt was judged for both")
    a, b = torch.tensor(both, dtype=torch.float64).T
    wins = (a > b).double() + 0.5 * (a == b).double()
    columns = torch.stack([wins, a, b, a - b], dim=1)
    return Comparison(len(both), *bootstrap(columns, seed))


def bootstrap(columns: Tensor, seed: int) -> list[Interval]:
    """The mean of every column of [N, K] values; rows are drawn together."""
    rows = len(columns)
    generator = torch.Generator().manual_seed(seed)
    # How often each row is drawn says as much as which ones, in a matrix product.
    means = columns.new_empty(DRAWS, columns.shape[1])
    for part in means.split(max(1, HELD // rows)):
        drawn = torch.randint(rows, (len(part), rows), generator=generator)
        counts = columns.new_zeros(len(part), rows)
        counts.scatter_add_(1, drawn, columns.new_ones(1).expand_as(drawn))
        part.copy_(counts @ columns / rows)
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=columns.dtype)
    low, high = torch.quantile(means, edges, dim=0).tolist()
    exact = columns.mean(0).tolist()
    return [Interval(*figures) for figures in zip(exact, low, high, strict=True)]
