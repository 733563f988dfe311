"""The picture of runs: reward, KL, entropy and more over their episodes, one colour a run.

A panel whose figure no run has measured (a KL without a reference) is left out. Where rewards have
several objectives, each has a panel with its scores as they were returned. Evaluations on the
held-out prompts are points on the run's curves. The last panel is where the time went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .run_files import RunRecord, read_run

__all__ = ["can_plot", "plot_runs", "save_plot"]

# A metric, the key of an evaluation that measures the same, unit, title.
Panel = tuple[str, str | None, str, str]
PANELS: tuple[Panel, ...] = (
    ("objective/scores", "score", "mean score", "Reward"),
    ("objective/kl", "kl", "nats a sequence", "KL to the reference (exact)"),
    ("objective/entropy", "entropy", "nats a token", "Entropy of the policy"),
    ("policy/clipfrac", None, "share of tokens", "Clipped by PPO"),
    ("val/explained_variance", None, "share of variance", "Explained by the critic"),
)
OBJECTIVE = "reward/"  # before an objective's name, in a metric
COLOURS = ("#1f6f8b", "#c8553d", "#5b8c5a", "#8e5aa8", "#b8902f", "#4b4e6d", "#d17a9b", "#6b6b6b")
SPREAD = 1.15  # headroom for a critic that is worse than the mean


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def save_plot(folders: Sequence[str | Path], output: Path, title: str | None = None) -> Path:
    """Draw the runs in ``folders`` to the image ``output``.

    Raises:
        UserError: a folder without a run, no matplotlib, or a file that cannot be written.
    """
    if not can_plot():
        raise UserError("a plot needs matplotlib; run: pip install matplotlib")
    runs = [read_run(folder) for folder in folders]
    try:
        # What matplotlib would add in silence.
        output = output if output.suffix else output.with_name(f"{output.name}.png")
        plot_runs(runs, output, title=title)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{output} cannot be written ({error}); give --output a name like plot.png"
        ) from error
    return output


def plot_runs(
    runs: Sequence[RunRecord], output: Path | BinaryIO, *, title: str | None = None, **options: Any
) -> None:
    """Draw ``runs`` to ``output``, a path or an open file (then `format` is in ``options``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(runs)
    names = unique_names(runs)
    columns = 3
    rows = -(-(len(panels) + 1) // columns)
    figure = Figure(figsize=(13, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        draw_panel(axes, panel, runs)
    draw_times(grid[len(panels)], runs, names)
    for axes in list(grid)[len(panels) + 1 :]:
        axes.set_axis_off()
    draw_legend(figure, grid[0], runs, names)
    figure.savefig(output, dpi=110, **options)


def panels_of(runs: Sequence[RunRecord]) -> list[Panel]:
    """The panels that a run has figures for; each objective's stand behind the reward's."""
    measured = dict.fromkeys(key for run in runs for line in run.metrics for key in line)
    objectives: list[Panel] = [
        (key, None, "mean score, unscaled", f"Objective: {key.removeprefix(OBJECTIVE)}")
        for key in measured
        if key.startswith(OBJECTIVE)
    ]
    return [p for p in (PANELS[0], *objectives, *PANELS[1:]) if p[0] in measured]


def draw_panel(axes: Any, panel: Panel, runs: Sequence[RunRecord]) -> None:
    key, evaluated, unit, name = panel
    drawn = []
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        points = [(line["episode"], line[key]) for line in run.metrics if key in line]
        if not points:
            continue
        # Above the curve of many rollouts, single points would hide it.
        marker = "." if len(points) <= 60 else None
        axes.plot(*zip(*points, strict=True), marker=marker, lw=1.2, color=colour)
        drawn += [value for _, value in points]
        held_out = [
            (run.episode(line["step"]), line[evaluated])
            for line in run.evaluations
            if evaluated and line.get(evaluated) is not None
        ]
        if held_out:
            style: dict[str, Any] = dict(color=colour, markerfacecolor="white", markersize=6, lw=1)
            axes.plot(*zip(*held_out, strict=True), "o--", **style)
            drawn += [value for _, value in held_out]
    axes.set_title(name, loc="left", fontsize=11)
    axes.set_ylabel(unit)
    axes.set_xlabel("episodes")
    axes.set_xlim(left=0)
    if drawn and min(drawn) >= 0:
        axes.set_ylim(bottom=0)
    if key == "val/explained_variance":
        # One early rollout at -40 would press all others into a line.
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -SPREAD), top=SPREAD)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_times(axes: Any, runs: Sequence[RunRecord], names: Sequence[str]) -> None:
    """A bar a run: mean seconds of each phase of a step."""
    phases: dict[str, None] = {}
    seconds: list[Counter[str]] = []
    for run in runs:
        total: Counter[str] = Counter()
        for line in run.metrics:
            total.update({k[5:]: v for k, v in line.items() if k.startswith("time/")})
        phases |= dict.fromkeys(total)
        seconds.append(Counter({k: v / len(run.metrics) for k, v in total.items()}))
    left = [0.0] * len(runs)
    for phase, alpha in zip(phases, (0.95, 0.6, 0.35, 0.2, 0.1, 0.05), strict=False):
        widths = [s[phase] for s in seconds]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(runs))]
        axes.barh(range(len(runs)), widths, left=left, color=colours, alpha=alpha, height=0.6)
        longest = max(range(len(runs)), key=lambda i: widths[i])
        if widths[longest] > 0.08 * max(sum(s.values()) for s in seconds):
            middle = left[longest] + widths[longest] / 2
            axes.text(middle, longest, phase, ha="center", va="center", fontsize=8)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(runs)), names if len(runs) > 1 else [""])
    axes.set_ylim(len(runs) - 0.3, -0.7)
    axes.set_title("Time of a step", loc="left", fontsize=11)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_legend(figure: Any, axes: Any, runs: Sequence[RunRecord], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    style: dict[str, Any] = dict(color="#6b6b6b", lw=1.2)
    handles = [
        Line2D([], [], marker=".", **style, label="rollouts"),
        Line2D([], [], marker="o", ls="--", markerfacecolor="white", **style, label="held out"),
    ]
    if not any(run.evaluations for run in runs):
        handles = handles[:1]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="best")
    if len(runs) > 1:
        coloured = [
            Line2D([], [], lw=2, color=COLOURS[i % len(COLOURS)], label=name)
            for i, name in enumerate(names)
        ]
        figure.legend(
            handles=coloured, frameon=False, loc="outside upper center", ncols=min(4, len(names))
        )


def unique_names(runs: Sequence[RunRecord]) -> list[str]:
    """The runs' names; where two are the same, their paths."""
    often = Counter(run.name for run in runs)
    return [run.name if often[run.name] == 1 else str(run.path) for run in runs]
