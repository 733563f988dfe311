"""docs/multi_agent.png and the table of docs/multi_agent.md, from the rows alone.

Thin lines are seeds, thick ones their mean.
"""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from multi_agent import GAMES, SETTINGS
from results import NOT_MEASURED, ROOT, read, with_tables

Row = dict[str, Any]
COLOURS = {
    "pair": "#1f6f8b", "listener alone": "#c8553d", "pool": "#1f6f8b", "no pool": "#c8553d",
    "untrained": "#8a8a8a",
}  # fmt: skip
NAMES = {
    "pair": "both learn",
    "listener alone": "the listener alone learns",
    "pool": "with past selves",
    "no pool": "without past selves",
    "untrained": "untrained",
}
WINDOW = 4  # rounds over which a training curve is averaged


def draw() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read("multi_agent")
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    success(panels[0, 0], rows)
    along(panels[0, 1], rows, "cooperative", "game/success", "The same, in training", "share")
    along(panels[0, 2], rows, "cooperative", "game/named", "Hints that name their word", "share")
    exam(panels[1, 0], rows)
    tournament(panels[1, 1], rows)
    matrix(panels[1, 2], rows)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        "Agents on one backbone. Above: a speaker and a listener find each other's words. Below: a "
        f"solver against a proposer of sums ({seeds} seeds)"
    )
    figure.savefig(ROOT / "docs" / "multi_agent.png", dpi=90)
    page = ROOT / "docs" / "multi_agent.md"
    page.write_text(with_tables(page.read_text(), TABLES))


def of(rows: Sequence[Row], game: str, kind: str, **fields: Any) -> list[Row]:
    wanted = {"game": game, "kind": kind} | fields
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def arms(rows: Sequence[Row], game: str) -> list[str]:
    there = {row["arm"] for row in rows if row["game"] == game}
    return [arm for arm in NAMES if arm in there and arm != "untrained"]


def lines(axes: Any, rows: Sequence[Row], field: str, arm: str, smooth: int = 1) -> None:
    """A thin line a seed and the thick one of their mean."""
    by_step: dict[int, list[float]] = {}
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed and row.get(field) is not None]
        steps = [row["step"] for row in own]
        raw = [row[field] for row in own]
        values = [fmean(raw[max(0, i + 1 - smooth) : i + 1]) for i in range(len(raw))]
        axes.plot(steps, values, color=COLOURS[arm], lw=0.8, alpha=0.5)
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(step, []).append(value)
    means = [fmean(values) for values in by_step.values()]
    axes.plot(list(by_step), means, color=COLOURS[arm], lw=2.5, label=NAMES[arm])


def dress(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def success(axes: Any, rows: Sequence[Row]) -> None:
    for arm in arms(rows, "cooperative"):
        found = of(rows, "cooperative", "evaluation", arm=arm)
        lines(axes, found, "game/success", arm)
    axes.axhline(1 / 3, color="#8a8a8a", ls="--", lw=1, label="a guess among three words")
    dress(axes, "Words found: unseen words", "share of dialogues")
    axes.set_xlabel(f"rounds of {(SETTINGS | GAMES['cooperative'])['batch_size']} dialogues")
    axes.legend(frameon=False, fontsize=8)


def along(axes: Any, rows: Sequence[Row], game: str, field: str, title: str, unit: str) -> None:
    for arm in arms(rows, game):
        lines(axes, of(rows, game, "round", arm=arm), field, arm, smooth=WINDOW)
    dress(axes, f"{title} (mean of {WINDOW} rounds)", unit)
    axes.set_xlabel("rounds")


def exam(axes: Any, rows: Sequence[Row]) -> None:
    for arm in arms(rows, "competitive"):
        lines(axes, of(rows, "competitive", "exam", arm=arm), "solved", arm)
    dress(axes, "The solver's exam: unseen sums", "share of tries")
    axes.set_xlabel("rounds")
    axes.legend(frameon=False, fontsize=8)


def tournament(axes: Any, rows: Sequence[Row]) -> None:
    """What each solver solves of the sums of all proposers: a bar a solver, a dot a seed."""
    for place, solver in enumerate(("untrained", "no pool", "pool")):
        by_seed = solved(rows, solver)
        if by_seed:
            axes.bar(place, fmean(by_seed), color=COLOURS[solver], alpha=0.7, width=0.6)
            axes.plot([place] * len(by_seed), by_seed, "o", color="black", ms=4)
    axes.set_xticks(range(3), [NAMES[x] for x in ("untrained", "no pool", "pool")], fontsize=8)
    dress(axes, "Tournament: all proposers' sums", "share of tries")


def solved(rows: Sequence[Row], solver: str) -> list[float]:
    """By seed: the share solved, each proposer counting the same."""
    own = [r for r in of(rows, "competitive", "tournament") if r["solver"] == solver]
    seeds = sorted({row["seed"] for row in own})
    return [
        fmean(r["solved"] for r in own if r["seed"] == seed and r["solved"] is not None)
        for seed in seeds
    ]


def matrix(axes: Any, rows: Sequence[Row]) -> None:
    """How far the solver wins, past selves against past selves: means over seeds."""
    found = of(rows, "competitive", "matrix", arm="pool")
    axes.set_title("How far the solver wins (with past selves)", loc="left", fontsize=11)
    if not found:
        return
    steps = found[0]["steps"]
    cells = [
        [lost_by_proposer([row["rates"][j][i] for row in found]) for j in range(len(steps))]
        for i in range(len(steps))
    ]
    axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1)
    for i, row in enumerate(cells):
        for j, rate in enumerate(row):
            axes.text(j, i, f"{rate:.2f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(steps)), steps)
    axes.set_yticks(range(len(steps)), steps)
    axes.set_xlabel("proposer after so many rounds")
    axes.set_ylabel("solver after so many rounds")


def lost_by_proposer(rates: Sequence[float | None]) -> float:
    """The solver's share of a cell, mean over seeds; not a number where no dialogue counts."""
    counted = [1 - rate for rate in rates if rate is not None]
    return fmean(counted) if counted else float("nan")


def table(rows: Sequence[Row]) -> str:
    """First and last figures of every arm and seed, and dialogues of the ends."""
    if not rows:
        return NOT_MEASURED
    lines = [
        "![Success of the pair, exam and tournament of the solver, win rates](multi_agent.png)",
        "",
        "| game | who learns | seed | held out, before | held out, after |",
        "|---|---|---|---|---|",
    ]
    kinds = {"cooperative": ("evaluation", "game/success"), "competitive": ("exam", "solved")}
    for game in GAMES:
        kind, field = kinds[game]
        for arm in arms(rows, game):
            for seed in sorted({row["seed"] for row in rows if row["game"] == game}):
                own = of(rows, game, kind, arm=arm, seed=seed)
                lines.append(
                    f"| {game} | {NAMES[arm]} | {seed} | {own[0][field]:.2f} | "
                    f"{own[-1][field]:.2f} |"
                )
    return "\n".join([*lines, "", *told_tournament(rows), *quotes(rows)])


def told_tournament(rows: Sequence[Row]) -> list[str]:
    if not of(rows, "competitive", "tournament"):
        return []
    figures = "; ".join(
        f"{NAMES[solver]}: {', '.join(f'{x:.2f}' for x in solved(rows, solver))}"
        for solver in ("untrained", "no pool", "pool")
    )
    return [
        "The tournament: the share solved of the same sums of all kept proposers of both arms, a "
        f"number a seed. {figures}.",
        "",
    ]


def quotes(rows: Sequence[Row]) -> list[str]:
    """Dialogues of the first seed, before and after."""
    lines = []
    for game, arm in (("cooperative", "pair"), ("competitive", "pool")):
        said = of(rows, game, "sample", arm=arm)
        own = [row for row in said if row["seed"] == min(x["seed"] for x in said)]
        for step in sorted({row["step"] for row in own}):
            shown = [spoken(row) for row in own if row["step"] == step][:4]
            when = f"after {step} rounds" if step else "untrained"
            lines.append(f"- {game}, {when}: " + "; ".join(shown))
    return lines


def spoken(row: Row) -> str:
    start = json.loads(row["prompt"])
    about = f"({start['target']}) " if "target" in start else ""
    return f"{about}`{row['completion'].replace('`', ' ').replace('|', '·')}`"


TABLES = {"multi_agent": lambda: table(read("multi_agent"))}

if __name__ == "__main__":
    draw()
