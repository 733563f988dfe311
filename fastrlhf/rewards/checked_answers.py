"""What a reward function may return: numbers, one or several a completion, or None.

Whatever else it returns is refused in a sentence that names the function and the completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import UserError
from .registry import UNBOUNDED

__all__ = ["checked_answer"]


def checked_answer(
    scores: Any,
    completions: Sequence[str],
    name: str,
    bounds: tuple[float, float] = UNBOUNDED,
    width: int = 1,
) -> list[list[float]]:
    """Scores by column (``width`` where none was judged), NaN for None, or what is wrong."""
    try:
        scores = list(scores)
    except TypeError as error:
        raise UserError(
            f"the reward {name!r} returned {type(scores).__name__}; "
            "return a list with one float per completion"
        ) from error
    if len(scores) != len(completions):
        raise UserError(
            f"the reward {name!r} returned {len(scores)} scores for {len(completions)} "
            "completions; return one each, in order"
        )
    rows = [several(row) for row in scores]
    widths = {len(row) for row, score in zip(rows, scores, strict=True) if score is not None}
    if len(widths) > 1:
        raise UserError(
            f"the reward {name!r} returned {' and '.join(map(str, sorted(widths)))} scores a "
            "completion; return as many for each"
        )
    width = widths.pop() if widths else width
    numbers = []
    for index, (row, score) in enumerate(zip(rows, scores, strict=True)):
        given = [None] * width if score is None else row
        numbers.append([number(x, name, index, completions[index], bounds) for x in given])
    return [list(column) for column in zip(*numbers, strict=True)]


def several(score: Any) -> list[Any]:
    if isinstance(score, Tensor):
        score = score.tolist()
    return list(score) if isinstance(score, list | tuple) else [score]


def number(
    score: Any, name: str, index: int, completion: str, bounds: tuple[float, float]
) -> float:
    if score is None:
        return math.nan
    try:
        value = float(score)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the reward {name!r} returned {score!r} for completion {index}; return a float or None"
        ) from error
    if not math.isfinite(value):
        raise UserError(
            f"the reward {name!r} returned {value} for completion {index} "
            f"({completion[:60]!r}); return a finite number, or None to skip it"
        )
    low, high = bounds
    if not low <= value <= high:
        raise UserError(
            f"the reward {name!r} returned {value:g} for completion {index} "
            f"({completion[:60]!r}), outside of its bounds [{low:g}, {high:g}]; correct it, or "
            "widen reward_bounds"
        )
    return value
