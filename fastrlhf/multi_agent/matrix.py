"""Win rates of every past self against every past self of the others: who beats whom, and when.

Learning agents are each other's environment, so a score along the run says little: it falls when
the other gets better. Entry [i, j] is how far the agent as it was after step i wins against the
others as they were after step j, on the same starts in every cell. Down a column the opponent stays
the same, so an agent that learns wins more; one that forgets wins less in the columns of old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .players import Players

__all__ = ["WinRates", "draw_win_rates", "win_rates"]


@dataclass(frozen=True)
class WinRates:
    """The matrix of one agent."""

    agent: str
    against: Sequence[str]
    steps: Sequence[int]  # of the past selves, the agent's in rows, the others' in columns
    games: int  # dialogues in a cell
    rates: Sequence[Sequence[float | None]]  # None: no dialogue of the cell counts

    def mean(self, row: int) -> float:
        """How far the past self of a row wins against all of the others' past selves."""
        return fmean(rate for rate in self.rates[row] if rate is not None)


def win_rates(
    players: Players,
    agent: str,
    games: int,
    seed: int,
    wanted: Callable[[], bool] = lambda: True,
) -> WinRates | None:
    """Play ``games`` dialogues in each cell, all from the same held-out starts.

    wanted: asked before each row; where it says no, there is no matrix.
    """
    game, pool = players.game, players.pool
    others = [other for other in game.agents if other != agent]
    steps = pool.steps
    starts = game.deal(games, torch.Generator().manual_seed(seed), True)
    rates: list[list[float | None]] = []
    for own in steps:
        if not wanted():
            return None
        # The same draws in every row: rows differ in who plays alone.
        generator = torch.Generator(players.backbone.device).manual_seed(seed)
        seats = [{agent: own} | dict.fromkeys(others, step) for step in steps for _ in starts]
        played = players.play([*starts] * len(steps), generator, seats, "matrix_games")
        won = [game.won(dialogue, agent) for dialogue in played.dialogues]
        cells = [won[i : i + len(starts)] for i in range(0, len(won), len(starts))]
        rates.append([mean_of(cell) for cell in cells])
    return WinRates(agent, others, steps, len(starts), rates)


def mean_of(won: Sequence[float | None]) -> float | None:
    counted = [x for x in won if x is not None]
    return fmean(counted) if counted else None


def draw_win_rates(found: Sequence[WinRates], path: Path, title: str) -> Path:
    """Draw matrices side by side; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * len(found), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, one in zip(figure.subplots(1, len(found), squeeze=False).flat, found, strict=True):
        draw_matrix(axes, one)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    return path


def draw_matrix(axes: Any, found: WinRates) -> None:
    """One matrix as a chequerboard with its numbers."""
    cells = [[float("nan") if rate is None else rate for rate in row] for row in found.rates]
    axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1)
    for i, row in enumerate(found.rates):
        for j, rate in enumerate(row):
            text = "–" if rate is None else f"{rate:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=9)
    places = range(len(found.steps))
    axes.set_xticks(places, found.steps)
    axes.set_yticks(places, found.steps)
    axes.set_xlabel(f"{' and '.join(found.against)} after so many rounds")
    axes.set_ylabel(f"{found.agent} after so many rounds")
    axes.set_title(f"How far {found.agent} wins", loc="left", fontsize=11)
