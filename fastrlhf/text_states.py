"""The trunk's output for texts that are scored again and again, kept within a budget.

Below the lowest trained layer nothing changes while a reward adapter trains, so these layers run
once for all epochs and evaluations. What does not fit the budget is computed wherever it is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .backbone import SharedBackbone

__all__ = ["TextStates", "by_length"]


def by_length(lengths: Sequence[int], rows: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """``rows`` in microbatches of like length, the longest first, padding counted."""
    left = sorted(rows, key=lambda row: -lengths[row])
    while left:
        count = max(1, tokens // lengths[left[0]])
        yield left[:count]
        left = left[count:]


class TextStates:
    """The states in which the trained layers take texts.

    Args:
        tokens: of each text.
        budget_mb: megabytes of states to keep; None: all of them.
        microbatch_tokens: in one forward, padding counted.
        done: told how many texts are ready, as they get ready.
    """

    def __init__(
        self,
        backbone: SharedBackbone,
        tokens: Sequence[Sequence[int]],
        *,
        budget_mb: int | None = None,
        microbatch_tokens: int = 2048,
        done: Callable[[int], None] = lambda count: None,
    ):
        self.backbone = backbone
        self.tokens = tokens
        self.lengths = [len(ids) for ids in tokens]
        self.microbatch_tokens = microbatch_tokens
        self.starts = [0, *itertools.accumulate(self.lengths)]
        self.flat: Tensor | None = None
        self.kept = 0
        if backbone.halves.split:
            # Of a decoder that trains from its first layer on, nothing would be saved.
            self.keep(budget_mb, done)

    @torch.no_grad()
    def keep(self, budget_mb: int | None, done: Callable[[int], None]) -> None:
        config = self.backbone.decoder.config
        dtype = self.backbone.head.weight.dtype
        room = self.starts[-1]
        if budget_mb is not None:
            room = budget_mb * 2**20 // (config.hidden_size * dtype.itemsize)
        self.kept = sum(end <= room for end in self.starts[1:])
        self.flat = torch.empty(
            self.starts[self.kept], config.hidden_size, dtype=dtype, device=self.backbone.device
        )
        ready = 0
        for rows in by_length(self.lengths, range(self.kept), self.microbatch_tokens):
            states = self.computed(rows)
            for row, own in zip(rows, states, strict=True):
                start, length = self.starts[row], self.lengths[row]
                self.flat[start : start + length] = own[:length]
            ready += len(rows)
            done(ready)

    @property
    def megabytes(self) -> float:
        """What is kept."""
        return 0.0 if self.flat is None else self.flat.numel() * self.flat.element_size() / 2**20

    def scores(self, rows: Sequence[int]) -> Tensor:
        """The reward role's scores of texts, [n] float32, in one forward."""
        assert self.backbone.reward_head is not None, "a backbone with a reward role"
        return self.backbone.reward_head(self.last(rows))

    def last(self, rows: Sequence[int]) -> Tensor:
        """The reward role's states at the last token of texts, [n, D], in one forward.

        Texts start at the left edge and no mask is needed: what comes after a token is hidden from
        it anyway.
        """
        width = max(self.lengths[row] for row in rows)
        cached = self.flat is not None and max(rows) < self.kept
        states = self.padded(rows, width) if cached else self.computed(rows)
        device = states.device
        everything = torch.ones(len(rows), width, dtype=torch.bool, device=device)
        hidden = self.backbone.hidden("reward", states, everything)
        last = torch.tensor([self.lengths[row] - 1 for row in rows], device=device)
        return hidden[torch.arange(len(rows), device=device), last]

    def padded(self, rows: Sequence[int], width: int) -> Tensor:
        assert self.flat is not None
        states = self.flat.new_zeros(len(rows), width, self.flat.shape[1])
        for own, row in zip(states, rows, strict=True):
            start, length = self.starts[row], self.lengths[row]
            own[:length] = self.flat[start : start + length]
        return states

    def computed(self, rows: Sequence[int]) -> Tensor:
        width = max(self.lengths[row] for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for own, row in zip(tokens, rows, strict=True):
            own[: self.lengths[row]] = torch.tensor(self.tokens[row])
        tokens = tokens.to(self.backbone.device)
        return self.backbone.trunk(tokens, torch.ones_like(tokens, dtype=torch.bool))

    @torch.no_grad()
    def all_scores(self, rows: Sequence[int] | None = None) -> Tensor:
        """Scores of texts (None: all) without gradients, in the order asked for, [n] float32."""
        assert self.backbone.reward_head is not None, "a backbone with a reward role"
        return self.backbone.reward_head(self.all_last(rows))

    @torch.no_grad()
    def all_last(self, rows: Sequence[int] | None = None) -> Tensor:
        """States at the last token of texts (None: all), without gradients, [n, D] float32."""
        rows = range(len(self.tokens)) if rows is None else rows
        place = {row: i for i, row in enumerate(rows)}
        size = self.backbone.decoder.config.hidden_size
        states = torch.empty(len(rows), size, device=self.backbone.device)
        for part in by_length(self.lengths, rows, self.microbatch_tokens):
            states[[place[row] for row in part]] = self.last(part).float()
        return states
