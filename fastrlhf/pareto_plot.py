"""The picture of a front between two rewards: what can be had of one for how much of the other.

The dashed line between the two trained policies is what tossing a coin between them at every prompt
would give: only what lies above it is a gain of interpolating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_front"]

COLOUR, BASELINE, GREY = "#1f6f8b", "#c8553d", "#6b6b6b"


def draw_front(front: Mapping[str, Any], labels: Sequence[str], output: Path) -> None:
    """Draw a front, as pareto.json has it, to the image ``output``.

    Args:
        labels: of the two rewards.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = front["points"]
    ends = [place(points[0]), place(points[-1])]
    coin = "a coin tossed between the two trained policies"
    axes.plot(*zip(*ends, strict=True), "--", lw=1.2, color=BASELINE, label=coin)
    best = sorted(place(x) for x in points if not x["dominated"])
    axes.plot(*zip(*best, strict=True), "o-", lw=1.8, color=COLOUR, label="front")
    if worse := [place(x) for x in points if x["dominated"]]:
        hollow: dict[str, Any] = dict(color=COLOUR, markerfacecolor="white", label="dominated")
        axes.plot(*zip(*worse, strict=True), "o", **hollow)
    axes.plot(*place(front["base"]), "x", color=GREY, markersize=8, label="before training")
    for point in points:
        label_point(axes, point)
    axes.set_xlabel(f"mean score: {labels[0]}")
    axes.set_ylabel(f"mean score: {labels[1]}")
    axes.set_title(
        f"{labels[0]} against {labels[1]}, {front['prompts']} held-out prompts (95 % intervals):\n"
        "two policies are trained, those between them are interpolated",
        loc="left",
        fontsize=11,
    )
    axes.margins(0.12)  # for what is written beside the points
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=110)


def label_point(axes: Any, point: Mapping[str, Any]) -> None:
    """A point's intervals, its weights and its KL."""
    across, up = (
        [[score["value"] - score["low"]], [score["high"] - score["value"]]]
        for score in point["scores"]
    )
    axes.errorbar(*place(point), xerr=across, yerr=up, color=COLOUR, alpha=0.3, lw=1)
    kl = "" if point["kl"] is None else f", KL {point['kl']:.1f}"
    text = " : ".join(f"{weight:.2g}" for weight in point["weights"]) + kl
    axes.annotate(text, place(point), xytext=(6, 6), textcoords="offset points", fontsize=8)


def place(point: Mapping[str, Any]) -> tuple[float, float]:
    """Where a point lies in the picture."""
    first, second = (score["value"] for score in point["scores"])
    return first, second
