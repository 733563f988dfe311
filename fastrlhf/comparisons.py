"""What is compared with what: texts as tokens, dealt in batches that score each text once.

A text that is in several pairs of a batch is run through the model once. Of ratings a batch is some
texts, and its pairs are all those among them whose ratings differ: n texts make up to n(n - 1)/2
pairs for n forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .errors import UserError

__all__ = ["Comparison", "PairedTexts", "Preferences", "RatedTexts", "rows_among", "with_gap"]

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
        """Batches in an epoch."""

    def split(self, held_out: int, seed: int) -> tuple[Preferences, Preferences]:
        """For training, and about ``held_out`` rows' worth beside it; no text is in both."""

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
        """Pairs of which one text is on either side are left out."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        taken = order[:held_out]
        theirs = torch.cat([self.chosen[taken], self.rejected[taken]])
        rest = order[held_out:]
        apart = ~(torch.isin(self.chosen[rest], theirs) | torch.isin(self.rejected[rest], theirs))
        if not apart.any():
            raise UserError(
                f"holding out {held_out} of {len(self)} pairs leaves none to train on: every other "
                "pair shares a text with them; lower eval_rows, or give an eval_dataset"
            )
        return self.take(rest[apart]), self.take(taken)

    def sample(self, rows: int, seed: int) -> PairedTexts:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:rows])

    def take(self, rows: Tensor) -> PairedTexts:
        part = self.among(rows)
        return PairedTexts(
            [self.tokens[i] for i in part.texts.tolist()], part.chosen, part.rejected, part.margin
        )


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
        shuffled = torch.randperm(len(self), generator=generator)
        shuffled_prompts = torch.randperm(int(self.prompts.max()) + 1, generator=generator)
        together = shuffled_prompts[self.prompts[shuffled]].argsort(stable=True)
        for texts in shuffled[together].split(2 * size):
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

    def compared(self, better: Tensor, all_texts: Tensor) -> Comparison:
        """The pairs in which one of ``better`` is preferred to one of ``all_texts``."""
        difference = self.ratings[better][:, None] - self.ratings[all_texts]
        same = self.prompts[better][:, None] == self.prompts[all_texts]
        row, column = ((difference > self.gap) & same).nonzero(as_tuple=True)
        # In `batches` both are the same list; in `pairs` the second is every text in order.
        first = row if len(better) == len(all_texts) else better[row]
        return Comparison(all_texts, first, column, difference[row, column])

    def split(self, held_out: int, seed: int) -> tuple[RatedTexts, RatedTexts]:
        """A text that several rows rate is on one side only."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        theirs = {tuple(self.tokens[i]) for i in order[:held_out]}
        rest = self.take(torch.tensor(order[:held_out]))
        others = [i for i in order[held_out:] if tuple(self.tokens[i]) not in theirs]
        train = self.take(torch.tensor(others, dtype=torch.long))
        for part in (train, rest):
            if not any(len(found.chosen) for found in part.pairs()):
                raise UserError(
                    f"holding out {held_out} of {len(self)} rated texts leaves no two of one "
                    "prompt with different ratings on either side; change eval_rows, or give an "
                    "eval_dataset"
                )
        return train, rest

    def sample(self, rows: int, seed: int) -> RatedTexts:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:rows])

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


def rows_among(part: Preferences, whole: Preferences) -> list[int]:
    """Which of the texts of ``whole`` those of its ``part`` are."""
    numbers = {tuple(ids): i for i, ids in enumerate(whole.tokens)}
    return [numbers[tuple(ids)] for ids in part.tokens]
