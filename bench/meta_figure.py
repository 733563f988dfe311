"""docs/meta.png and the table of docs/meta.md, from the rows alone.

A thin line is a seed, a thick one their mean.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from results import ROOT, read, with_tables

Row = dict[str, Any]
NAMES = {
    "meta": "meta-initialisation (Reptile)",
    "joint": "trained on the mean of the training rewards",
    "base": "base model",
}
COLOURS = {"meta": "#1f6f8b", "joint": "#b8902f", "base": "#8a8a8a"}


def draw() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in read("meta") if row["kind"] == "curve"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4.4 * (len(tasks) + 1), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks) + 1, sharey=True)
    for axes, task in zip(panels, [None, *tasks], strict=True):
        panel(axes, rows, task)
    panels[0].set_ylabel("score on held-out prompts")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        "Learning a new reward from a meta-learnt start and from the base: SmolLM2-135M, rewards "
        f"and prompts not seen in training ({seeds} {'seed' if seeds == 1 else 'seeds'})"
    )
    figure.savefig(ROOT / "docs" / "meta.png", dpi=100)
    page = ROOT / "docs" / "meta.md"
    page.write_text(with_tables(page.read_text(), TABLES))


def panel(axes: Any, rows: Sequence[Row], task: str | None) -> None:
    """One held-out task, or the mean of all."""
    for arm, name in NAMES.items():
        curves = [curve(rows, arm, seed, task) for seed in seeds_of(rows, arm)]
        if not curves:
            continue
        for after, scores in curves:
            axes.plot(after, scores, color=COLOURS[arm], lw=0.8, alpha=0.6)
        after = curves[0][0]
        means = [fmean(scores) for scores in zip(*(x[1] for x in curves), strict=True)]
        axes.plot(after, means, color=COLOURS[arm], lw=2.6, label=name)
    shown = "mean of the held-out rewards" if task is None else f"held out: {task}"
    axes.set_title(shown, loc="left", fontsize=11)
    axes.set_xlabel("rollouts of adaptation")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def seeds_of(rows: Sequence[Row], arm: str) -> list[int]:
    return sorted({row["seed"] for row in rows if row["arm"] == arm})


def curve(
    rows: Sequence[Row], arm: str, seed: int, task: str | None
) -> tuple[list[int], list[float]]:
    """The rollouts and the scores after them; of no task in particular, means over all."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if (row["arm"], row["seed"]) == (arm, seed) and task in (None, row["task"]):
            by_step.setdefault(row["after"], []).append(row["score"])
    return list(by_step), [fmean(scores) for scores in by_step.values()]


def told() -> str:
    """The figure, and a line for each start and seed."""
    every = read("meta")
    rows = [row for row in every if row["kind"] == "curve"]
    if not rows:
        return "Not measured yet."
    points = sorted({row["after"] for row in rows})
    shown = sorted({points[0], points[len(points) // 2], points[-1]})
    heads = " | ".join(f"after {x}" for x in shown)
    lines = [
        "![Held-out scores along adaptations from three starts](meta.png)",
        "",
        f"| start | seed | {heads} | rollouts to the base's last score |",
        f"|---|---|{'---|' * (len(shown) + 1)}",
    ]
    for arm, name in NAMES.items():
        for seed in seeds_of(rows, arm):
            after, scores = curve(rows, arm, seed, None)
            goal = curve(rows, "base", seed, None)[1][-1]
            reached = next((x for x, y in zip(after, scores, strict=True) if y >= goal), None)
            figures = " | ".join(f"{scores[after.index(x)]:.2f}" for x in shown)
            last = f"more than {points[-1]}" if reached is None else reached
            lines.append(f"| {name} | {seed} | {figures} | {last} |")
    about = next(row for row in every if row["kind"] == "run")
    lines += [
        "",
        f"Mean scores over the held-out rewards ({', '.join(about['held_out'])}) on "
        f"{about['eval_prompts']} held-out prompts, after so many rollouts of "
        f"{about['batch_size']} completions. The meta-initialisation and, where it is shown, the "
        f"joint start were trained on {about['episodes']} completions of "
        f"{about['response_length']} tokens, with the rewards {', '.join(about['tasks'])}. "
        f"Measured on {about['device']}, torch "
        f"{about['torch']}, threads: {about['threads']}.",
    ]
    return "\n".join(lines)


TABLES = {"meta": told}
