"""The linear reward that explains preferences best on states that do not change.

Bradley–Terry's loss is convex in the head's weights, and with the states computed once it is solved
in seconds by L-BFGS. How much weights are held back is chosen on a tenth of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..comparisons import Comparison, Preferences, rows_among
from ..errors import UserError
from .preference_loss import bradley_terry, measure

__all__ = ["fit_head"]

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
TEXTS = 256  # half of the texts among which pairs are made
ITERATIONS = 40


def fit_head(states: Tensor, preferences: Preferences, seed: int) -> Tensor:
    """Weights [D] for states [m, D] of the texts of ``preferences``, in their order."""
    try:
        fitted, checked = preferences.split(max(1, len(preferences) // 10), seed)
    except UserError:
        # Too few rows, or rows that share their texts: nothing is left to choose by.
        return solve(states, preferences, PENALTIES[0], seed)
    own, other = (states[rows_among(part, preferences)] for part in (fitted, checked))
    best, lowest = None, float("inf")
    for penalty in PENALTIES:
        weights = solve(own, fitted, penalty, seed)
        stats = measure(other @ weights, checked.pairs())
        if stats.loss / stats.pairs < lowest:
            best, lowest = weights, stats.loss / stats.pairs
    assert best is not None, "some penalty gives a finite loss"
    return best


def solve(states: Tensor, preferences: Preferences, penalty: float, seed: int) -> Tensor:
    std = states.std(0).clamp_min(1e-6)
    scaled = (states - states.mean(0)) / std
    generator = torch.Generator().manual_seed(seed)
    batches = list(preferences.batches(TEXTS, generator))
    pairs = sum(len(batch.chosen) for batch in batches)
    weights = torch.zeros(states.shape[1], device=states.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def share(batch: Comparison) -> Tensor:
        scores = scaled[batch.texts] @ weights
        loss = bradley_terry(scores[batch.chosen], scores[batch.rejected])
        return loss * (len(batch.chosen) / pairs)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((share(batch) for batch in batches), 0.5 * penalty * weights.square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weights / std).detach()
