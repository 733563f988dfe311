"""Bradley–Terry: how scores explain preferences, and how well (docs/math.md, section 6).

Pure functions of scores and pairs. A pair is predicted to be preferred as it was with probability
sigmoid(score of chosen - score of rejected).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..comparisons import Comparison

__all__ = ["PreferenceStats", "bradley_terry", "draw_reliability", "measure"]

BINS = 10


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center: float = 0.0
) -> Tensor:
    """`(-logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2).mean()`.

    chosen, rejected: [n] scores of pairs. margin: by how much the better one should win, at least.
    center: keeps the scores about 0 (Eisenstein et al. 2023). Source: Bradley and Terry 1952;
    Stiennon et al. 2020; the margin of Touvron et al. 2023 (Llama 2).
    """
    loss = -logsigmoid(chosen - rejected - margin)
    if center:
        loss = loss + center * (chosen + rejected) ** 2
    return loss.mean()


@dataclass
class PreferenceStats:
    """What scores say of pairs, summed over them."""

    pairs: int = 0
    correct: float = 0.0  # ties are half right
    margin: float = 0.0
    loss: float = 0.0
    # By how sure the prediction is: probability 0.5 to 1 in ten bins.
    bin_pairs: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    bin_confidence: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    bin_correct: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Take in pairs with these scores, [n] each."""
        difference = (chosen - rejected).double().cpu()
        correct = (difference > 0).double() + 0.5 * (difference == 0).double()
        confidence = torch.sigmoid(difference.abs())
        bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
        self.pairs += len(difference)
        self.correct += float(correct.sum())
        self.margin += float(difference.sum())
        self.loss += float(-logsigmoid(difference).sum())
        self.bin_pairs.index_add_(0, bins, torch.ones_like(confidence))
        self.bin_confidence.index_add_(0, bins, confidence)
        self.bin_correct.index_add_(0, bins, correct)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: |right - predicted|, weighted by the pairs of each bin."""
        return float((self.bin_correct - self.bin_confidence).abs().sum()) / self.pairs

    def metrics(self, prefix: str) -> dict[str, float]:
        """Means over the pairs, under names that start with ``prefix``."""
        return {
            f"{prefix}/accuracy": self.correct / self.pairs,
            f"{prefix}/margin": self.margin / self.pairs,
            f"{prefix}/loss": self.loss / self.pairs,
            f"{prefix}/calibration_error": self.calibration_error,
        }


def measure(scores: Tensor, pairs: Iterable[Comparison]) -> PreferenceStats:
    """Compare the scores of all texts ([m]) with what was preferred."""
    stats = PreferenceStats()
    for part in pairs:
        own = scores[part.texts]
        stats.add(own[part.chosen], own[part.rejected])
    return stats


def draw_reliability(stats: PreferenceStats, path: Path, title: str) -> Path:
    """Draw how often predictions of each sureness are right to the image ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    used = stats.bin_pairs > 0
    sure = (stats.bin_confidence / stats.bin_pairs)[used]
    right = (stats.bin_correct / stats.bin_pairs)[used]
    share = (stats.bin_pairs / stats.pairs)[used]
    axes.plot([0.5, 1], [0.5, 1], color="#999999", linewidth=1, label="calibrated")
    axes.bar(sure, share, width=0.02, color="#cbdfe5", label="share of pairs")
    axes.plot(sure, right, "o-", color="#1f6f8b", label="held-out pairs")
    axes.set_xlim(0.5, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("predicted probability of the preferred side")
    axes.set_ylabel("share that was preferred")
    axes.set_title(f"{title} (error {stats.calibration_error:.3f})", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path
