"""A competitive game: the proposer poses a sum, the solver has a few tries at it.

A problem is a first line like `17+5`, two numbers from 1 to `largest`; the verifier does the rest.
The solver's try earns 1 if it is right, else 0. The proposer earns, where k of m tries were right,

    middle   k·(m - k), over its greatest value: what neither always nor never succeeds
    hard     1 - k/m: what fails

and -1 for what is no problem. `middle` is the default: a problem that nobody solves teaches the
solver nothing (all tries earn the same, and REINFORCE learns from differences), so a proposer that
is paid for failure alone drives the solver to where it stops learning. k·(m - k) is, but for a
factor, the unbiased estimate of p·(1 - p), the variance of what a try earns. It falls as the solver
learns, so the proposer has to move on: the two are in competition. Similar rewards: Sukhbaatar et
al. 2018 (asymmetric self-play), Zhao et al. 2025 (learnability).

One sum in `one_in` is held out: proposed in training, it is judged for neither side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from statistics import fmean
from typing import Literal

import torch
from torch import Generator

from ..algorithm_settings import require
from .game import Dialogue, Start

__all__ = ["ProposerSolver"]

PROPOSER, SOLVER = "proposer", "solver"
PROBLEM = re.compile(r"(\d{1,3})\+(\d{1,3})")
NUMBER = re.compile(r"\d{1,4}")


class ProposerSolver:
    """The game.

    Args:
        largest: the largest number in a problem.
        tries: of the solver; none of them sees another.
        pays: what the proposer is paid for.
        examples: problems that the proposer is shown, drawn anew for every dialogue.
        one_in: one sum in so many is held out.
        solver_sees: the solver's prompt, with {problem}.
    """

    name = "proposer and solver"
    agents = (PROPOSER, SOLVER)
    bounds = (-1.0, 1.0)
    stop: str | None = "\n"

    def __init__(
        self,
        *,
        largest: int = 20,
        tries: int = 2,
        pays: Literal["middle", "hard"] = "middle",
        examples: int = 2,
        one_in: int = 5,
        solver_sees: str = "2+3=5\n{problem}=",
    ):
        require(1 <= largest <= 999, "largest must lie between 1 and 999")
        require(tries >= 1, "tries must be at least 1")
        require(pays in ("middle", "hard"), "pays must be 'middle' or 'hard'")
        require(pays == "hard" or tries >= 2, "pays: middle needs tries of 2 or more")
        require(examples >= 1, "examples must be at least 1")
        require(one_in >= 2, "one_in must be at least 2")
        self.largest, self.tries, self.pays, self.examples = largest, tries, pays, examples
        self.one_in, self.solver_sees = one_in, solver_sees
        for kind, use in ((False, "train on"), (True, "hold out")):
            sums = combinations_with_replacement(range(1, largest + 1), 2)
            require(
                any(self.is_held_out(problem) == kind for problem in sums),
                f"of the sums up to {largest} + {largest}, one in {one_in} leaves none to {use}; "
                "raise largest or change one_in",
            )
        self.max_turns = 1 + tries
        digits = len(str(largest))
        # Each digit may be a token, and the line's end is one.
        self.turn_tokens: Mapping[str, int] = {
            PROPOSER: 2 * digits + 2,
            SOLVER: len(str(2 * largest)) + 1,
        }

    def is_held_out(self, problem: tuple[int, int]) -> bool:
        """Whether a sum is never trained on; it is so in either order."""
        low, high = sorted(problem)
        return (31 * low + 17 * high) % self.one_in == 0

    def exam(self, count: int, seed: int) -> list[Start]:
        """Starts with held-out problems for the solver; none comes twice before all have come."""
        numbers = range(1, self.largest + 1)
        held = [(a, b) for a in numbers for b in numbers if self.is_held_out((a, b))]
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed)).tolist()
        return [{"problem": "{}+{}".format(*held[order[i % len(held)]])} for i in range(count)]

    def deal(self, count: int, generator: Generator, held_out: bool) -> list[Start]:
        """The examples that the proposer sees; held out are those of problems that are."""
        return [
            {
                "examples": [self.draw(generator, held_out) for _ in range(self.examples)],
                "held_out": held_out,
            }
            for _ in range(count)
        ]

    def draw(self, generator: Generator, held_out: bool) -> str:
        while True:
            a, b = torch.randint(1, self.largest + 1, (2,), generator=generator).tolist()
            if self.is_held_out((a, b)) == held_out:
                return f"{a}+{b}"

    def problem(self, dialogue: Dialogue) -> tuple[int, int] | None:
        """The numbers to add; None: what was proposed is no problem."""
        given = dialogue.start.get("problem")
        text = first_line(dialogue.said_by(PROPOSER)[0]) if given is None else given
        match = PROBLEM.fullmatch(text)
        if match is None:
            return None
        a, b = int(match[1]), int(match[2])
        fits = all(
            1 <= x <= self.largest and str(x) == y
            for x, y in zip((a, b), match.groups(), strict=True)
        )
        return (a, b) if fits else None

    def unjudged(self, dialogue: Dialogue) -> bool:
        """Whether the problem is one that training must not see."""
        problem = self.problem(dialogue)
        exempt = "problem" in dialogue.start or dialogue.start.get("held_out")
        return problem is not None and not exempt and self.is_held_out(problem)

    def next_agent(self, dialogue: Dialogue) -> str | None:
        """The proposer, unless the start has the problem; then the solver's tries at a sum."""
        if "problem" not in dialogue.start and not dialogue.turns:
            return PROPOSER
        over = len(dialogue.said_by(SOLVER)) == self.tries
        if over or self.problem(dialogue) is None or self.unjudged(dialogue):
            return None
        return SOLVER

    def prompt(self, dialogue: Dialogue, agent: str) -> str:
        """Examples to go on from, or the problem alone."""
        if agent == PROPOSER:
            return "".join(f"{example}\n" for example in dialogue.start["examples"])
        problem = self.problem(dialogue)
        assert problem is not None
        return self.solver_sees.format(problem="{}+{}".format(*problem))

    def right(self, dialogue: Dialogue) -> list[bool]:
        """Of each try, whether it is the sum."""
        problem = self.problem(dialogue)
        total = None if problem is None else str(sum(problem))
        said = [first_line(text) for text in dialogue.said_by(SOLVER)]
        return [bool(NUMBER.fullmatch(text)) and text == total for text in said]

    def rewards(self, dialogue: Dialogue) -> list[float | None]:
        """The proposer's by how many tries were right, and each try's own."""
        if self.unjudged(dialogue):
            return [None] * len(dialogue.turns)
        right = self.right(dialogue)
        k, m = sum(right), self.tries
        if self.problem(dialogue) is None:
            earned = -1.0
        elif self.pays == "hard":
            earned = 1 - k / m
        else:
            earned = k * (m - k) / ((m // 2) * (m - m // 2))
        proposer: list[float | None] = [] if "problem" in dialogue.start else [earned]
        return [*proposer, *map(float, right)]

    def won(self, dialogue: Dialogue, agent: str) -> float | None:
        """The solver by its share of right tries, the proposer by the rest; without a problem 0."""
        if self.unjudged(dialogue):
            return None
        right = self.right(dialogue)
        solved = fmean(right) if right else 1.0
        return solved if agent == SOLVER else 1 - solved

    def figures(self, dialogues: Sequence[Dialogue]) -> dict[str, float]:
        """Share of problems among what was proposed, of right tries, and how much they differ."""
        found = [self.problem(d) for d in dialogues]
        problems = [problem for problem in found if problem is not None]
        tries = [right for d in dialogues for right in self.right(d)]
        figures = {"valid": len(problems) / len(found)}
        if problems:
            figures["mean_sum"] = fmean(map(sum, problems))
            figures["distinct"] = len(set(problems)) / len(problems)
        return figures | ({"solved": fmean(tries)} if tries else {})


def first_line(text: str) -> str:
    """The first line, without the spaces around it."""
    return text.strip().split("\n")[0].strip()
