"""The picture of fronts between two rewards: what can be had of one for how much of the other.

The dashed line between the two trained policies is what tossing a coin between them would give:
only what lies above it is a gain of interpolating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_front"]

COLOURS = ("#1f6f8b", "#c8553d", "#5b8c5a", "#8e5aa8", "#b8902f", "#4b4e6d")


def draw_front(
    fronts: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    output: Path,
    *,
    title: str | None = None,
    names: Sequence[str] = (),
) -> None:
    """Draw fronts, each as pareto.json has it, to the image ``output``.

    Args:
        labels: of the two rewards.
        names: of the fronts, where there are several.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, front in enumerate(fronts):
        alone = len(fronts) == 1
        name = "" if alone else f" ({names[number]})" if names else f" ({number + 1})"
        draw_one(axes, front, COLOURS[number % len(COLOURS)], name, bars=alone)
    axes.set_xlabel(f"mean score: {labels[0]}")
    axes.set_ylabel(f"mean score: {labels[1]}")
    axes.set_title(
        title
        or f"{labels[0]} against {labels[1]}: two policies are trained,\n"
        "those between them are their adapters interpolated",
        loc="left",
        fontsize=11,
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=110)


def draw_one(axes: Any, front: Mapping[str, Any], colour: str, name: str, *, bars: bool) -> None:
    points = front["points"]
    kept = [x for x in points if not x["dominated"]]
    worse = [x for x in points if x["dominated"]]
    ends = [place(points[0]), place(points[-1])]
    axes.plot(*zip(*ends, strict=True), "--", lw=1, color=colour, alpha=0.5,
              label=f"a coin tossed between the two{name}")  # fmt: skip
    line = sorted(map(place, kept))
    axes.plot(*zip(*line, strict=True), "o-", color=colour, lw=1.5, label=f"front{name}")
    if worse:
        axes.plot(*zip(*map(place, worse), strict=True), "o", color=colour,
                  markerfacecolor="white", label=f"dominated{name}")  # fmt: skip
    base = place(front["base"])
    axes.plot(*base, "x", color=colour, markersize=8, label=f"before training{name}")
    for x in points:
        if bars:
            lows_and_highs = [
                [[s["value"] - s["low"]], [s["high"] - s["value"]]] for s in x["scores"]
            ]
            axes.errorbar(*place(x), xerr=lows_and_highs[0], yerr=lows_and_highs[1],
                          color=colour, alpha=0.35, lw=1)  # fmt: skip
        kl = "" if x["kl"] is None else f", KL {x['kl']:.1f}"
        shares = " : ".join(f"{weight:.2g}" for weight in x["weights"])
        if bars:
            axes.annotate(
                f"{shares}{kl}", place(x), xytext=(6, 6), textcoords="offset points", fontsize=8
            )


def place(point: Mapping[str, Any]) -> tuple[float, float]:
    """Where a point lies in the picture."""
    first, second = (score["value"] for score in point["scores"])
    return first, second
