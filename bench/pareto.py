"""The front between sentiment and brevity on SmolLM2-135M, by `fastrlhf pareto`.

A seed is two trainings, one for each reward, and the policies between them, whose adapters are
interpolated. The baseline is the line between the two trained policies: what tossing a coin between
them at every prompt would give, which needs no interpolation. Rewards, prompts and samples of all
policies of a seed are the same; the prompts are held out.

    python bench/pareto.py [--seeds 1,2] [--points 5] [--jobs 2] [--quick] [--print] [key=value …]
    python bench/pareto.py --figure      only draws docs/pareto.png and the table from the rows

Puts a seed's rows into bench/results/pareto.jsonl in the place of those that it had (with --print
and --quick: only prints), draws the figure and makes the table of docs/rewards.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from results import NOT_MEASURED, ROOT, keep, read, stamp, with_tables

SENTIMENT, BREVITY = "sentiment", "length_band(2, 4)"
NAMES = {SENTIMENT: "sentiment", BREVITY: "brevity"}
QUICK = ["total_episodes=32", "batch_size=16", "eval_prompts=16"]
COLOUR, BASELINE = "#1f6f8b", "#c8553d"
Row = dict[str, Any]


def run(seed: int, points: int, settings: Sequence[str]) -> list[Row]:
    """One front, in a process of its own with one thread; its rows: the base and each policy."""
    begun = stamp() | {"threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastrlhf.cli", "pareto", "--config", "pareto"]
        command += ["--rewards", SENTIMENT, BREVITY, "--points", str(points)]
        done = subprocess.run(
            [*command, "--output", f"{folder}/front", f"seed={seed}", *settings],
            check=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    front = json.loads(done.stdout)
    rows = []
    for number, point in enumerate([front["base"], *front["points"]]):
        row = {"bench": "pareto", "seed": seed, "point": None if number == 0 else number - 1}
        row |= {"weights": point["weights"], "dominated": point["dominated"]}
        for reward, score in zip(front["rewards"], point["scores"], strict=True):
            row |= {NAMES[reward]: {key: round(x, 4) for key, x in score.items()}}
        row |= {key: round(point[key], 4) for key in ("kl", "entropy", "distinct_2")}
        row |= {"prompts": front["prompts"], "seconds": round(front["seconds"], 1)}
        rows.append(row | {"settings": list(settings)} | begun)
    return rows


def by_point(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of every seed at each point, from one trained policy to the other."""
    places = sorted({row["point"] for row in rows if row["point"] is not None})
    return [[row for row in rows if row["point"] == place] for place in places]


def mean(rows: Sequence[Row], name: str) -> float:
    return statistics.mean(row[name]["value"] for row in rows)


def above_the_line(points: Sequence[Sequence[Row]], here: Sequence[Row]) -> float:
    """How far a point's mean brevity is above the line between the ends, at its mean sentiment."""
    (x0, y0), (x1, y1) = (
        (mean(end, "sentiment"), mean(end, "brevity")) for end in (points[0], points[-1])
    )
    share = (mean(here, "sentiment") - x0) / (x1 - x0)
    return mean(here, "brevity") - (y0 + share * (y1 - y0))


def table() -> str:
    rows = read("pareto")
    if not rows:
        return NOT_MEASURED
    base = [row for row in rows if row["point"] is None]
    lines = [
        "![brevity over sentiment: the policies between two trained ones](pareto.png)",
        "",
        "| weights | sentiment | brevity | above the line | KL | distinct-2 | dominated |",
        "|---|---|---|---|---|---|---|",
    ]
    points = by_point(rows)
    for here in [base, *points]:
        first, second = here[0]["weights"]
        is_base = here is base
        name = "before training" if is_base else f"{first:.3g} : {second:.3g}"
        gain = "" if is_base else f"{above_the_line(points, here):+.3f}"
        worse = "" if is_base else f"{sum(x['dominated'] for x in here)} of {len(here)} seeds"
        kl, text = (statistics.mean(x[key] for x in here) for key in ("kl", "distinct_2"))
        scores = f"{mean(here, 'sentiment'):+.3f} | {mean(here, 'brevity'):.3f}"
        lines.append(f"| {name} | {scores} | {gain} | {kl:.2f} | {text:.2f} | {worse} |")
    row, seconds = rows[0], {x["seed"]: x["seconds"] for x in rows}.values()
    lines += [
        "",
        f"SmolLM2-135M, means of {len(seconds)} seeds with {row['prompts']} held-out prompts each; "
        "the line is what tossing a coin between the two trained policies would give. A front took "
        f"{statistics.mean(seconds) / 60:.1f} minutes. Measured on {row['device']}, torch "
        f"{row['torch']}, threads: {row['threads']}.",
    ]
    return "\n".join(lines)


def draw() -> None:
    """docs/pareto.png and the table, from the rows alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read("pareto")
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seeds = sorted({row["seed"] for row in rows})
    for seed in seeds:
        own = [row for row in rows if row["seed"] == seed and row["point"] is not None]
        places = [(row["sentiment"]["value"], row["brevity"]["value"]) for row in own]
        name = f"{len(seeds)} seeds" if seed == seeds[0] else ""
        axes.plot(*zip(*places, strict=True), ".-", color=COLOUR, lw=0.8, alpha=0.45, label=name)
    points = by_point(rows)
    places = [(mean(here, "sentiment"), mean(here, "brevity")) for here in points]
    axes.plot(*zip(*places, strict=True), "o-", color=COLOUR, lw=2.5, label="interpolated: mean")
    ends = [places[0], places[-1]]
    axes.plot(*zip(*ends, strict=True), "--", color=BASELINE, lw=1.5,
              label="baseline: a coin tossed between the two")  # fmt: skip
    base = [row for row in rows if row["point"] is None]
    axes.plot(mean(base, "sentiment"), mean(base, "brevity"), "x", color="#6b6b6b", markersize=9,
              label="before training")  # fmt: skip
    for here, at in zip(points, places, strict=True):
        first, second = here[0]["weights"]
        kl = statistics.mean(row["kl"] for row in here)
        axes.annotate(f"{first:.3g} : {second:.3g}, KL {kl:.1f}", at, xytext=(7, 7),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlabel("mean score: sentiment (VADER)")
    axes.set_ylabel(f"mean score: brevity ({BREVITY})")
    axes.set_title(
        "Sentiment against brevity, SmolLM2-135M, held-out prompts:\n"
        "two policies are trained, those between them are interpolated",
        loc="left",
        fontsize=11,
    )
    axes.margins(0.12)  # for what is written beside the points
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "pareto.png", dpi=110)
    page = ROOT / "docs" / "rewards.md"
    page.write_text(with_tables(page.read_text(), {"pareto": table}))


def main() -> None:
    parser = argparse.ArgumentParser(description="The front between sentiment and brevity.")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="a rollout or two, only printed")
    parser.add_argument("--print", action="store_true", help="print rows, write nothing")
    parser.add_argument("--figure", action="store_true", help="only draw")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    given = parser.parse_args()
    seeds = [] if given.figure else [int(seed) for seed in given.seeds.split(",")]
    settings = [*given.settings, *(QUICK if given.quick else [])]
    with ThreadPoolExecutor(given.jobs) as pool:
        for rows in pool.map(lambda seed: run(seed, given.points, settings), seeds):
            if given.print or given.quick:
                print("".join(json.dumps(row) + "\n" for row in rows), end="")
            else:
                keep("pareto", rows, ("seed",))
    if not (given.print or given.quick):
        draw()


if __name__ == "__main__":
    main()
