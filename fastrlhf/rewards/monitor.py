"""Watches for reward hacking: a score that rises because the text has found a way around it.

Every rollout is reduced to a few figures (`monitor/...` in metrics.jsonl) and compared with the
run's own first rollouts: `rewards/warning_signs.py` has the signs, with thresholds and why. A sign
is told once, when it first shows, in a sentence with its figures and an example from the rollout.
What follows is the setting `hacking`: nothing more (`warn`), a kl_coef that grows by a quarter in
every rollout that shows a sign (`raise_kl`), or the end of the run (`stop`).

With a `gold` judge, which nothing is trained on, there is the surest sign: the score rises while
the judge's falls (Gao et al. 2023). It is asked once a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import correlation, fmean, pstdev
from typing import Any

from torch import Tensor

from ..advantages import equal_scores
from ..config import PPOConfig
from ..controllers import KLController
from ..errors import UserError
from ..text_figures import compression, distinct, repeated_share
from ..types import Rollout
from .functions import RewardFunction, RewardScorer
from .warning_signs import SIGNS, WINDOW, Figures, Sign

__all__ = ["Finding", "HackingMonitor"]

RAISE = 1.25
# Of each completion, to tell whether completions are alike: all words of long ones never are.
DISTINCT_WORDS = 50
# What a sparse reward or a short response_length shows too: told, and no reason to act.
ONLY_TOLD = ("truncation", "contrast")


@dataclass(frozen=True)
class Finding:
    """A sign of reward hacking, when it first showed."""

    step: int
    sign: str  # a name of `warning_signs.SIGNS`
    sentence: str  # with the figures
    example: str  # the completion of that rollout that shows it best

    def __str__(self) -> str:
        return f"step {self.step}: {self.sentence} Such as: {self.example!r}"


class HackingMonitor:
    """Watches the rollouts of one run.

    Args:
        config: `hacking`, `gold` and `num_generations` are read.
        gold: a judge that is not trained on; None: that of ``config``, if it names one.
        tell: called with each new finding.

    Raises:
        UserError: a gold judge that does not exist, or one that fails when it is asked.
    """

    def __init__(
        self,
        config: PPOConfig,
        gold: str | RewardFunction | None = None,
        tell: Callable[[Finding], object] = lambda finding: None,
    ):
        self.config = config
        gold = config.gold if gold is None else gold
        # The weights and bounds are those of the reward that is trained on.
        judged = replace(config, reward_weights=None, reward_bounds=None)
        with of_gold():
            self.gold = None if gold is None else RewardScorer(gold, judged)
        self.tell = tell
        self.found: list[Finding] = []
        # The run's first rollouts, and its last 2 * WINDOW.
        self.first: list[Figures] = []
        self.last: list[Figures] = []
        self.showing: list[str] = []

    @classmethod
    def of_run(
        cls,
        config: PPOConfig,
        append: Callable[[str, Mapping[str, Any]], object],
        say: Callable[[str], object],
    ) -> HackingMonitor:
        """One that keeps its findings in findings.jsonl (``append``) and ``say``s them."""
        ending = "\nstopped, as hacking is stop" if config.hacking == "stop" else ""

        def tell(finding: Finding) -> None:
            append("findings.jsonl", asdict(finding))
            say(f"reward hacking? {finding}{ending}")

        return cls(config, tell=tell)

    def probe(self, prompts: Sequence[str], columns: Sequence[dict[str, Any]]) -> None:
        """Ask the gold judge once before any time is lost, a reward model too: it has its own base.

        Raises:
            UserError: it fails, or what it returns cannot be.
        """
        if self.gold is not None:
            with of_gold():
                self.gold.probe(prompts, columns, models=True)

    @property
    def findings(self) -> list[str]:
        """Every sign that has shown so far, as a sentence with the step and an example."""
        return [str(finding) for finding in self.found]

    @property
    def stops(self) -> bool:
        """Whether the run is to end."""
        signs = {finding.sign for finding in self.found}
        return self.config.hacking == "stop" and bool(signs.difference(ONLY_TOLD))

    def observe(
        self,
        rollout: Rollout,
        scores: Tensor,
        line: Mapping[str, Any],
        controller: KLController | None = None,
    ) -> dict[str, float]:
        """Learn how a rollout went.

        Args:
            scores: [B], NaN where a completion was not judged.
            line: the rollout's metrics; `step` is read, and `objective/kl` where there is one.
            controller: to `respond` to.

        Returns:
            The figures as metrics, and how many signs show.
        """
        rows = rows_of(rollout, scores, self.gold)
        if not rows:
            return {}
        figures = summary(rows, line.get("objective/kl"), self.config)
        figures["zero_std"] = flat_share(scores, self.config.num_generations)
        if self.first and figures.get("kl"):
            gained = figures["score"] - fmean(x["score"] for x in self.first)
            figures["score_per_nat"] = gained / figures["kl"]
        if len(self.first) < WINDOW:
            self.first.append(figures)
        self.last = [*self.last, figures][-2 * WINDOW :]
        self.showing = []
        for sign in SIGNS:
            sentence = sign.sentence(self.first, self.last)
            if sentence is not None:
                self.showing.append(sign.name)
                self.note(sign, sentence, rows, int(line["step"]))
        if controller is not None:
            self.respond(controller)
        # The line has the mean score and the KL already.
        shown = figures.keys() - {"score", "kl"}
        metrics = {f"monitor/{name}": figures[name] for name in sorted(shown)}
        return metrics | {"monitor/signs": float(len(self.showing))}

    def note(self, sign: Sign, sentence: str, rows: Sequence[Row], step: int) -> None:
        if any(finding.sign == sign.name for finding in self.found):
            return
        example = max(rows, key=partial(weight, sign.example))
        text = " ".join(example.text.split())
        self.found.append(
            Finding(step, sign.name, sentence, text if len(text) < 200 else text[:200] + " …")
        )
        self.tell(self.found[-1])

    def respond(self, controller: KLController) -> None:
        """Raise the weight of the KL where that is asked for and the last rollout showed a sign."""
        if self.config.hacking == "raise_kl" and set(self.showing).difference(ONLY_TOLD):
            controller.coef *= RAISE

    def state_dict(self) -> dict[str, Any]:
        """All that `observe` has learnt, as JSON can hold it."""
        return {
            "first": [dict(x) for x in self.first],
            "last": [dict(x) for x in self.last],
            "found": [asdict(x) for x in self.found],
            "showing": list(self.showing),
            "gold": None if self.gold is None else self.gold.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.first = [dict(x) for x in state["first"]]
        self.last = [dict(x) for x in state["last"]]
        self.found = [Finding(**x) for x in state["found"]]
        self.showing = list(state["showing"])
        if self.gold is not None and state.get("gold") is not None:
            self.gold.load_state_dict(state["gold"])


@contextmanager
def of_gold() -> Iterator[None]:
    """Within the block errors name the setting that they are of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"gold: {error}") from error


@dataclass(frozen=True)
class Row:
    """A judged completion."""

    text: str
    score: float
    length: int  # tokens
    ended: bool
    repetition: float
    gold: float | None


def rows_of(rollout: Rollout, scores: Tensor, gold: RewardScorer | None) -> list[Row]:
    golds = [math.nan] * len(scores) if gold is None else gold(rollout).tolist()
    columns = zip(
        rollout.completions, scores.tolist(), rollout.completion_ids(), rollout.ended.tolist(),
        golds, strict=True,
    )  # fmt: skip
    return [
        Row(
            text, score, len(ids), ended, repeated_share(ids),
            None if math.isnan(judged) else judged,
        )
        for text, score, ids, ended, judged in columns
        if not math.isnan(score)
    ]  # fmt: skip


def summary(rows: Sequence[Row], kl: float | None, config: PPOConfig) -> Figures:
    """A rollout's figures; those that it does not have are left out."""
    scores, lengths = [row.score for row in rows], [float(row.length) for row in rows]
    texts = [row.text for row in rows]
    figures = {
        "score": fmean(scores),
        "score_std": pstdev(scores),
        "length": fmean(lengths),
        "repetition": fmean(row.repetition for row in rows),
        "compression": compression(texts),
    }
    figures |= {f"distinct_{n}": distinct(texts, n, DISTINCT_WORDS) for n in (1, 2, 3)}
    if config.stop_token is not None:
        figures["eos"] = fmean(row.ended for row in rows)
        figures["truncated"] = 1 - figures["eos"]
    if pstdev(scores) and pstdev(lengths):
        figures["score_length"] = correlation(scores, lengths)
    if kl is not None:
        figures["kl"] = kl
    golds = [row.gold for row in rows if row.gold is not None]
    if golds:
        figures |= {"gold": fmean(golds), "gold_std": pstdev(golds)}
    return figures


def weight(example: str, row: Row) -> float:
    """How well a completion shows the sign whose example is the one with the highest this."""
    if example == "gold" and row.gold is not None:
        return -row.gold
    return {"repetition": row.repetition, "length": float(row.length)}.get(example, row.score)


def flat_share(scores: Tensor, num_generations: int) -> float:
    """The share of groups whose scores, [B], are all equal; of completions by themselves: 1 or 0.

    NaN is no score, and a group without any does not count.
    """
    size = num_generations if num_generations > 1 else len(scores)
    judged = ~scores.view(-1, size).isnan().all(1)
    return float(equal_scores(scores, size)[judged].float().mean())
