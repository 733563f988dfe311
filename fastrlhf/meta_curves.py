"""What a meta training tells: held-out evaluations along adaptations, a meta step's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from .evaluation import Evaluation

__all__ = ["Adaptation", "Line", "mean_line", "mean_of"]

Line = dict[str, Any]


@dataclass(frozen=True)
class Adaptation:
    """How a task was adapted to: held-out evaluations along the way."""

    task: str
    steps: list[int] = field(default_factory=list)  # rollouts learnt from; 0 is the initialisation
    evaluations: list[Evaluation] = field(default_factory=list)  # after each of them
    broken: str | None = None  # why it ended early

    @property
    def scores(self) -> list[float]:
        """The held-out score after each of `steps`."""
        return [evaluation.score for evaluation in self.evaluations]


def mean_of(by_task: Mapping[str, Evaluation]) -> Evaluation:
    """One evaluation of several, each counting alike; its samples say of which task they are."""
    found = list(by_task.values())
    kls = [one.kl for one in found if one.kl is not None]
    return Evaluation(
        score=fmean(one.score for one in found),
        kl=fmean(kls) if kls else None,
        entropy=fmean(one.entropy for one in found),
        distinct_2=fmean(one.distinct_2 for one in found),
        scores=[score for one in found for score in one.scores],
        prompts=[prompt for one in found for prompt in one.prompts],
        completions=[text for one in found for text in one.completions],
        told=[{"task": name, **x} for name, one in by_task.items() for x in one.told],
    )


def mean_line(tried: Sequence[Sequence[Line]]) -> Line:
    """A meta step's metrics from those of its adaptations' rollouts.

    Means over the tasks of what their last rollouts show, `meta/first_score` of their first ones,
    `meta/gain` between the two, and the seconds of all.
    """
    first, last = [lines[0] for lines in tried], [lines[-1] for lines in tried]
    shared = [k for k in last[0] if "/" in k and all(k in line for line in last)]
    made: Line = {k: fmean(x[k] for x in last) for k in shared if not k.startswith("time/")}
    made["meta/first_score"] = fmean(line["objective/scores"] for line in first)
    made["meta/gain"] = made["objective/scores"] - made["meta/first_score"]
    every = [line for lines in tried for line in lines]
    for name in dict.fromkeys(k for line in every for k in line if k.startswith("time/")):
        made[name] = sum(line.get(name, 0.0) for line in every)
    return made
