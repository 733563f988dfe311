"""The picture of a run: reward, KL, entropy and clipfrac over its episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["can_plot", "plot_run"]

PANELS = (
    ("objective/scores", "mean score", "Reward"),
    ("objective/kl", "nats a sequence", "KL to the reference (exact)"),
    ("objective/entropy", "nats a token", "Entropy of the policy"),
    ("policy/clipfrac", "share of tokens", "Clipped by PPO"),
)


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def plot_run(
    metrics: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    held_out: tuple[float, float] | None = None,
) -> Path:
    """Draw ``metrics`` (the lines of metrics.jsonl) to the image ``path``.

    Args:
        held_out: scores on the held-out prompts before and after, drawn over the rewards.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    episodes = [line["episode"] for line in metrics]
    for axes, (key, unit, name) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        if any(key not in line for line in metrics):
            # Without a reference no KL is measured.
            axes.set_axis_off()
            continue
        axes.plot(episodes, [line[key] for line in metrics], marker=".", color="#1f6f8b")
        if key == "objective/scores" and held_out is not None:
            axes.plot([0, episodes[-1]], held_out, "o--", color="#c8553d", label="held-out prompts")
            axes.legend(frameon=False, loc="lower right")
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_ylabel(unit)
        axes.set_xlabel("episodes")
        axes.set_xlim(left=0)
        if min(line[key] for line in metrics) >= 0:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path
