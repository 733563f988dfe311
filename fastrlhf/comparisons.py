"""What is compared with what: texts as tokens, dealt in batches that score each text once.

A text that is in several pairs of a batch is run through the model once. Of ratings a batch is some
texts, and its pairs are all those among them whose ratings differ: n texts make up to n(n - 1)/2
pairs for n forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .errors import UserError

__all__ = [
    "Comparison",
    "PairedTexts",
    "Preferences",
    "RatedTexts",
    "check_compared",
    "epochs_of",
    "rows_among",
    "with_gap",
]

# Scores of this many texts are compared with all others at a time.
ROWS = 512


@dataclass(frozen=True)
class Comparison:
    """Pairs among some texts."""

    texts: Tensor  # [m] int64, which texts; each once
    chosen: Tensor  # [n] int64, into those m: the better ones
    rejected: Tensor  # [n] int64, into those m: the worse ones
    margin: Tensor  # [n] float32: 0, or how much better


class Preferences(Protocol):
    """Texts and what is preferred to what."""

    @property
    def tokens(self) -> Sequence[Sequence[int]]:
        """Of each text."""

    def __len__(self) -> int:
        """Rows: pairs, or rated texts."""

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Comparison]:
        """One epoch in batches of about ``size`` pairs' texts, in a fresh order."""

    def pairs(self) -> Iterator[Comparison]:
        """All pairs, in pieces."""

    def num_batches(self, size: int) -> int:
        """Batches in an epoch, at most: one that compares nothing is not dealt."""

    def split(self, held_out: int, seed: int) -> tuple[Preferences, Preferences]:
        """For training, and about ``held_out`` rows beside it; no text is in both."""

    def sample(self, rows: int, seed: int) -> Preferences:
        """At most ``rows`` rows of it."""


@dataclass(frozen=True)
class PairedTexts:
    """Pairs that were given one by one; a row is a pair."""

    tokens: Sequence[Sequence[int]]  # of the distinct texts
    chosen: Tensor  # [n] int64, into tokens
    rejected: Tensor  # [n] int64, into tokens
    margin: Tensor  # [n] float32

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Comparison]:
        """``size`` pairs a batch."""
        for rows in torch.randperm(len(self), generator=generator).split(size):
            yield self.among(rows)

    def num_batches(self, size: int) -> int:
        return -(-len(self) // size)

    def pairs(self) -> Iterator[Comparison]:
        yield self.among(torch.arange(len(self)))

    def among(self, rows: Tensor) -> Comparison:
        both = torch.stack([self.chosen[rows], self.rejected[rows]])
        texts, places = both.unique(return_inverse=True)
        return Comparison(texts, places[0], places[1], self.margin[rows])

    def split(self, held_out: int, seed: int) -> tuple[PairedTexts, PairedTexts]:
        """At most ``held_out`` pairs: all those that share texts are on one side.

        Where that gives less than half as many, one group of them is cut, and its pairs of which
        one text is on either side are left out.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        groups = self.groups()
        order = order[whole_groups_first(groups[order], held_out)]
        groups = groups[order]
        # Rows before the group that would be cut.
        whole = int(torch.isin(groups, groups[held_out:]).int().argmax())
        held_out = whole if 2 * whole >= held_out else held_out
        taken, rest = order[:held_out], order[held_out:]
        theirs = torch.cat([self.chosen[taken], self.rejected[taken]])
        apart = ~(torch.isin(self.chosen[rest], theirs) | torch.isin(self.rejected[rest], theirs))
        if not apart.any():
            raise UserError(
                f"holding out {held_out} of {len(self)} pairs leaves none to train on: every other "
                "pair shares a text with them; lower eval_rows, or give an eval_dataset"
            )
        return self.take(rest[apart]), self.take(taken)

    def groups(self) -> Tensor:
        """Which group each pair is in, [n] int64: pairs with a text in common are in one."""
        above = list(range(len(self.tokens)))

        def top(text: int) -> int:
            while above[text] != text:
                above[text] = above[above[text]]
                text = above[text]
            return text

        for chosen, rejected in zip(self.chosen.tolist(), self.rejected.tolist(), strict=True):
            above[top(chosen)] = top(rejected)
        return torch.tensor([top(text) for text in self.chosen.tolist()], dtype=torch.long)

    def sample(self, rows: int, seed: int) -> PairedTexts:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:rows])

    def take(self, rows: Tensor) -> PairedTexts:
        part = self.among(rows)
        return PairedTexts(
            [self.tokens[i] for i in part.texts.tolist()], part.chosen, part.rejected, part.margin
        )


def whole_groups_first(groups: Tensor, count: int) -> Tensor:
    """An order of rows in which the first ``count`` cut at most one of their groups.

    Groups that fit go first, as they come; then the others, the smallest first.
    """
    sizes = dict(zip(*(x.tolist() for x in groups.unique(return_counts=True)), strict=True))
    fitting: list[int] = []
    others: list[int] = []
    for group in dict.fromkeys(groups.tolist()):
        fits = sizes[group] <= count
        count -= sizes[group] if fits else 0
        (fitting if fits else others).append(group)
    others.sort(key=sizes.__getitem__)
    place = {group: i for i, group in enumerate(fitting + others)}
    return torch.tensor([place[group] for group in groups.tolist()]).argsort(stable=True)


@dataclass(frozen=True)
class RatedTexts:
    """Texts with ratings; a row is a text, and those of one prompt are compared."""

    tokens: Sequence[Sequence[int]]
    ratings: Tensor  # [n] float32
    prompts: Tensor  # [n] int64, which prompt each answers
    gap: float = 0.0  # ratings differ by more than this, or say nothing

    def __len__(self) -> int:
        return len(self.ratings)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Comparison]:
        """2 · ``size`` texts a batch, those of a prompt together, and all pairs among them."""
        for texts in self.by_prompt(generator).split(2 * size):
            found = self.compared(texts, texts)
            if len(found.chosen):
                yield found

    def num_batches(self, size: int) -> int:
        return -(-len(self) // (2 * size))

    def pairs(self) -> Iterator[Comparison]:
        everything = torch.arange(len(self))
        for some in everything.split(ROWS):
            found = self.compared(some, everything)
            if len(found.chosen):
                yield found

    @cached_property
    def texts(self) -> Tensor:
        """Which text each row rates, [n] int64: that of several rows has one number."""
        numbers: dict[tuple[int, ...], int] = {}
        found = [numbers.setdefault(tuple(ids), len(numbers)) for ids in self.tokens]
        return torch.tensor(found, dtype=torch.long)

    def compared(self, better: Tensor, all_texts: Tensor) -> Comparison:
        """The pairs in which one of ``better`` is preferred to another text of ``all_texts``."""
        difference = self.ratings[better][:, None] - self.ratings[all_texts]
        comparable = self.prompts[better][:, None] == self.prompts[all_texts]
        comparable &= self.texts[better][:, None] != self.texts[all_texts]
        row, column = ((difference > self.gap) & comparable).nonzero(as_tuple=True)
        # In `batches` both are the same list; in `pairs` the second is every text in order.
        first = row if len(better) == len(all_texts) else better[row]
        return Comparison(all_texts, first, column, difference[row, column])

    def split(self, held_out: int, seed: int) -> tuple[RatedTexts, RatedTexts]:
        """A prompt is on one side only, and so is a text that several rows rate."""
        order = self.by_prompt(torch.Generator().manual_seed(seed))
        counts = self.prompts[order].unique_consecutive(return_counts=True)[1]
        if len(counts) > 1:
            ends = counts.cumsum(0)[:-1].tolist()
            held_out = next((end for end in ends if end >= held_out), ends[-1])
        theirs = {tuple(self.tokens[i]) for i in order[:held_out].tolist()}
        rest = self.take(order[:held_out])
        others = [i for i in order[held_out:].tolist() if tuple(self.tokens[i]) not in theirs]
        train = self.take(torch.tensor(others, dtype=torch.long))
        if not (compares(train) and compares(rest)):
            raise UserError(
                f"holding out {held_out} of {len(self)} rated texts leaves no two of one "
                "prompt with different ratings on either side; change eval_rows, or give an "
                "eval_dataset"
            )
        return train, rest

    def sample(self, rows: int, seed: int) -> RatedTexts:
        """Whole prompts, but for the last one."""
        return self.take(self.by_prompt(torch.Generator().manual_seed(seed))[:rows])

    def by_prompt(self, generator: torch.Generator) -> Tensor:
        """All rows in an order that is drawn, those of a prompt together."""
        shuffled = torch.randperm(len(self), generator=generator)
        prompts = torch.randperm(int(self.prompts.max()) + 1, generator=generator)
        return shuffled[prompts[self.prompts[shuffled]].argsort(stable=True)]

    def take(self, rows: Tensor) -> RatedTexts:
        return RatedTexts(
            [self.tokens[i] for i in rows.tolist()],
            self.ratings[rows],
            self.prompts[rows],
            self.gap,
        )


def with_gap(preferences: Preferences, gap: float) -> Preferences:
    """Ratings must differ by more than ``gap`` to be a pair; pairs that were given stay."""
    rated = isinstance(preferences, RatedTexts)
    return replace(preferences, gap=gap) if rated else preferences  # type: ignore[type-var]


def epochs_of(
    preferences: Preferences, epochs: int, size: int, generator: torch.Generator
) -> Iterator[tuple[Comparison, float, bool]]:
    """Each batch of some epochs, the epochs done by its end, and whether it ends one."""
    planned = preferences.num_batches(size)
    for epoch in range(epochs):
        dealt = preferences.batches(size, generator)
        batch, place = next(dealt, None), 0
        while batch is not None:
            following, place = next(dealt, None), place + 1
            ends = following is None
            yield batch, epoch + (1.0 if ends else place / planned), ends
            batch = following


def compares(preferences: Preferences) -> bool:
    return any(len(found.chosen) for found in preferences.pairs())


def check_compared(held_out: Preferences, train_sample: Preferences, gap: float) -> None:
    """Raise UserError where there is no pair to evaluate on."""
    for part, name in ((held_out, "held out"), (train_sample, "sampled from training")):
        if not compares(part):
            raise UserError(
                f"of the {len(part)} texts {name}, no two of one prompt have ratings that differ "
                f"by more than eval_rating_gap ({gap:g}); lower it, or raise eval_rows"
            )


def rows_among(part: Preferences, whole: Preferences) -> list[int]:
    """Which of the texts of ``whole`` those of its ``part`` are."""
    numbers = {tuple(ids): i for i, ids in enumerate(whole.tokens)}
    return [numbers[tuple(ids)] for ids in part.tokens]
