"""docs/hierarchical.png and the table of docs/hierarchical.md, from the rows alone.

Thin lines are seeds, thick ones their means.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mode_prompts import FACTS, SCENES
from results import NOT_MEASURED, ROOT, read, with_tables

COLOURS = {"hierarchical": "#1f6f8b", "random": "#7fa650", "listed": "#d9a441", "flat": "#c8553d"}
NAMES = {
    "hierarchical": "hierarchical: a mode picked for each prompt",
    "random": "modes picked at random",
    "listed": "flat, all instructions in every prompt",
    "flat": "flat",
}
MODE_COLOURS = {"concise": "#5b4b8a", "informative": "#9a9a9a", "creative": "#2a9d6f"}
STYLES = {FACTS: "-", SCENES: "--"}
Row = dict[str, Any]


def draw() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read("hierarchical")
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    arms = [arm for arm in NAMES if any(row["arm"] == arm for row in rows)]
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        lines(left, own, lambda row: row["score"], COLOURS[arm], "-", NAMES[arm])
    left.set_title("Score of held-out prompts", loc="left", fontsize=11)
    left.set_ylabel("mean score, 0 to 1")
    own = [row for row in rows if row["arm"] == "hierarchical"]
    for kind, style in STYLES.items():
        for mode, colour in MODE_COLOURS.items():
            lines(
                right, own, lambda row, k=kind, m=mode: row["by_kind"][k]["modes"].get(m, 0.0),
                colour, style, f"{mode}, {kind}", thin=False,
            )  # fmt: skip
    right.set_title("What the high level picks, by kind of prompt", loc="left", fontsize=11)
    right.set_ylabel("share of held-out prompts")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlabel("episodes trained on")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        "Hierarchical against flat PPO at equal samples: the best mode depends on the prompt "
        f"(SmolLM2-135M, {seeds} {'seed' if seeds == 1 else 'seeds'})"
    )
    figure.savefig(ROOT / "docs" / "hierarchical.png", dpi=100)
    page = ROOT / "docs" / "hierarchical.md"
    page.write_text(with_tables(page.read_text(), {"hierarchical": lambda: told(rows)}))


def lines(
    axes: Any,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    colour: str,
    style: str,
    label: str,
    thin: bool = True,
) -> None:
    """A line a seed and their mean, by episodes."""
    seeds = sorted({row["seed"] for row in rows})
    for seed in seeds if thin else []:
        own = [row for row in rows if row["seed"] == seed]
        axes.plot(
            [row["episodes"] for row in own], [value(row) for row in own], style, color=colour,
            lw=0.7, alpha=0.6,
        )  # fmt: skip
    by_episodes: dict[int, list[float]] = {}
    for row in rows:
        by_episodes.setdefault(row["episodes"], []).append(value(row))
    means = [statistics.mean(found) for found in by_episodes.values()]
    axes.plot(list(by_episodes), means, style, color=colour, lw=2.2, label=label)


def told(rows: Sequence[Row]) -> str:
    """The figure, each run's end, and whether the hierarchical policy ended higher."""
    if not rows:
        return NOT_MEASURED
    lines = [
        "![Held-out score by episodes of four arms, and the modes picked for each kind of prompt]"
        "(hierarchical.png)",
        "",
        "| arm | seed | before | after | mean along the run | facts | scenes | KL | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ends: dict[tuple[str, int], float] = {}
    for arm, seed in runs_of(rows):
        own = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        end, kinds = own[-1], own[-1]["by_kind"]
        ends[arm, seed] = end["score"]
        mean = statistics.mean(row["score"] for row in own[1:])
        lines.append(
            f"| {arm} | {seed} | {own[0]['score']:.2f} | {end['score']:.2f} | {mean:.2f} | "
            f"{kinds[FACTS]['score']:.2f} | {kinds[SCENES]['score']:.2f} | {end['kl']:.2f} | "
            f"{end['seconds'] / 60:.1f} |"
        )
    seeds = sorted({seed for arm, seed in ends if arm == "hierarchical"})
    others = [arm for arm in NAMES if arm != "hierarchical" and any(a == arm for a, _ in ends)]
    above = []
    for arm in others:
        paired = [seed for seed in seeds if (arm, seed) in ends]
        count = sum(ends["hierarchical", seed] > ends[arm, seed] for seed in paired)
        above.append(f"{arm} in {count} of {len(paired)} seeds")
    last = rows[-1]
    lines += [
        "",
        f"Scores of held-out prompts after {max(row['episodes'] for row in rows)} episodes (mean "
        "along the run: of all evaluations but the first); KL in nats a sequence. The hierarchical "
        f"policy ends above {', '.join(above)}. Measured on {last['device']}, torch "
        f"{last['torch']}, one thread.",
    ]
    return "\n".join(lines)


def runs_of(rows: Sequence[Row]) -> list[tuple[str, int]]:
    found = {(row["arm"], row["seed"]) for row in rows}
    return sorted(found, key=lambda pair: (list(NAMES).index(pair[0]), pair[1]))
