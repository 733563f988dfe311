"""docs/kl_control.png and the table and samples of docs/reward_hacking.md, from the rows alone.

Lines are means over seeds, bands reach from the lowest seed to the highest.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from kl_control import TARGET
from results import ROOT, read, with_tables

COLOURS = {"adaptive": "#1f6f8b", "none": "#c8553d", "fixed": "#8a8a8a"}
NAMES = {
    "adaptive": "KL steered to its target",
    "none": "no KL penalty",
    "fixed": "KL coefficient fixed",
}
Row = dict[str, Any]


def draw() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read("kl_control")
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2).flat
    for axes, (field, title, unit) in zip(panels, PANELS, strict=True):
        for arm in NAMES:
            band(axes, rows, arm, field)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel(unit)
        axes.set_xlabel("rollouts of 32 episodes")
        axes.set_xlim(left=1)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if field == "kl":
            target(axes, rows)
        else:
            mark_findings(axes, rows, MARKED.get(field, ()))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        "Without a penalty on the KL the score is hacked: it rises while the text collapses "
        f"({seeds} {'seed' if seeds == 1 else 'seeds'})"
    )
    figure.savefig(ROOT / "docs" / "kl_control.png", dpi=100)
    page = ROOT / "docs" / "reward_hacking.md"
    page.write_text(with_tables(page.read_text(), {"kl_control": lambda: told(rows)}))


PANELS = (
    ("kl", "KL to the model before training", "nats a sequence"),
    ("score", "What is trained on: VADER's sentiment", "mean score"),
    ("distinct_2", "Diversity of the text", "distinct word pairs over word pairs"),
    ("gold", "What is not trained on: are these a review's words?", "gold score, nats a word"),
)


# The signs that a panel shows the matter of.
MARKED = {"distinct_2": ("repetition", "diversity", "compression"), "gold": ("gold",)}


def curves(rows: Sequence[Row], arm: str, field: str) -> tuple[list[int], list[list[float]]]:
    """The steps, and for each the values of all seeds."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if row["kind"] == "step" and row["arm"] == arm and row[field] is not None:
            by_step.setdefault(row["step"], []).append(row[field])
    return list(by_step), list(by_step.values())


def band(axes: Any, rows: Sequence[Row], arm: str, field: str) -> None:
    steps, values = curves(rows, arm, field)
    if not steps:
        return
    colour = COLOURS[arm]
    axes.plot(steps, [sum(x) / len(x) for x in values], color=colour, label=NAMES[arm])
    axes.fill_between(
        steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2
    )


def target(axes: Any, rows: Sequence[Row]) -> None:
    axes.axhspan(0.8 * TARGET, 1.2 * TARGET, color=COLOURS["adaptive"], alpha=0.15, lw=0)
    axes.axhline(TARGET, color=COLOURS["adaptive"], ls="--", lw=1)
    axes.set_ylim(0, 4 * TARGET)
    axes.annotate(
        f"target {TARGET:g} ± 20 %",
        (1, 3.6),
        xycoords=("axes fraction", "data"),
        ha="right",
        color=COLOURS["adaptive"],
    )


def mark_findings(axes: Any, rows: Sequence[Row], signs: Sequence[str]) -> None:
    """Where the monitor first spoke of one of ``signs``, a line for each run."""
    label = "the monitor speaks of it (a line a seed)"
    for arm, seed in runs_of(rows):
        steps = [step for step, sign in found(rows, arm, seed) if sign in signs]
        if steps:
            axes.axvline(min(steps), color=COLOURS[arm], ls=":", lw=1.5, label=label)
            label = ""


def found(rows: Sequence[Row], arm: str, seed: int) -> list[tuple[int, str]]:
    """When each sign of a run first showed."""
    here = [r for r in rows if r["kind"] == "finding" and (r["arm"], r["seed"]) == (arm, seed)]
    return [(row["step"], row["sign"]) for row in here]


def last_third(rows: Sequence[Row], arm: str, seed: int, field: str) -> float:
    """The mean over the last third of a run."""
    here = [r for r in rows if r["kind"] == "step" and (r["arm"], r["seed"]) == (arm, seed)]
    return statistics.mean(row[field] for row in here[-(len(here) // 3) :])


def runs_of(rows: Sequence[Row]) -> list[tuple[str, int]]:
    found = {(row["arm"], row["seed"]) for row in rows}
    return sorted(found, key=lambda pair: (list(NAMES).index(pair[0]), pair[1]))


def told(rows: Sequence[Row]) -> str:
    """A line for each run, whether the controller's rule holds, and what collapsed."""
    lines = [
        "| arm | seed | score | KL | kl_coef | distinct-2 | repetition | gold | signs, first at |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, seed in runs_of(rows):
        fields = ("score", "kl", "kl_coef", "distinct_2", "repetition", "gold")
        score, kl, coef, *text = (last_third(rows, arm, seed, field) for field in fields)
        signs = [f"{sign} ({step})" for step, sign in found(rows, arm, seed)]
        first = ", ".join(signs) or "none"
        lines.append(
            f"| {NAMES[arm]} | {seed} | {score:+.2f} | {kl:.2f} | {coef:.3f} | {text[0]:.2f} | "
            f"{text[1]:.2f} | {text[2]:.2f} | {first} |"
        )
    steered = [last_third(rows, *run, "kl") for run in runs_of(rows) if run[0] == "adaptive"]
    held = sum(abs(kl / TARGET - 1) <= 0.2 for kl in steered)
    steps = max(row["step"] for row in rows if row["kind"] == "step")
    lines += [
        "",
        f"Means of the last third of {steps} rollouts; KL in nats a sequence, gold in nats a word "
        "(0: the words of people's reviews, in their shares). The rule for the controller: in the "
        f"last third the mean KL lies within 20 % of {TARGET:g}. It holds for {held} of "
        f"{len(steered)} seeds.",
        "",
        "What the monitor showed of the runs without a penalty, in their own words:",
        "",
    ]
    return "\n".join(lines + quotes(rows))


def quotes(rows: Sequence[Row]) -> list[str]:
    """For each seed without a penalty what was said of its text, and a sample of its end."""
    lines = []
    for arm, seed in runs_of(rows):
        here = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        said = [row for row in here if row["kind"] == "finding" and row["sign"] != "truncation"]
        if arm != "none" or not said:
            continue
        first = min(said, key=lambda row: row["step"])
        samples = [row for row in here if row["kind"] == "sample"]
        end = [row for row in samples if row["step"] == max(x["step"] for x in samples)]
        shown = sorted(end, key=lambda row: row["score"])[len(end) // 2]
        completion = " ".join(shown["completion"].split())
        lines += [
            f"- Seed {seed}, rollout {first['step']}: {first['sentence']}",
            f"  At the end, a completion of middling score ({shown['score']:+.2f}): "
            f"\u201c{completion}\u201d",
        ]
    return lines
