"""How a minibatch is cut into microbatches, and where each token of a microbatch lies.

Three ways, by a budget of tokens a microbatch, its padding counted; a microbatch has at least one
sequence:

- sorted: sequences of like length together, the longest first. They start at the left edge, and a
  microbatch is as wide as its longest. No mask is needed: what comes after a token, padding too, is
  hidden from it anyway.
- packed: one row without padding; positions restart at 0 where a sequence starts.
- in_order: as they come, every sequence padded as in the rollout.

Sums over tokens do not depend on the cut, but for rounding. In the first two the last token of a
sequence is left out: its state predicts nothing. All is worked out in host memory, so that no shape
waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Layout", "Microbatching", "Sequences", "cut"]

Microbatching = Literal["sorted", "packed", "in_order"]


@dataclass(frozen=True)
class Sequences:
    """Which tokens of a rollout are real, in host memory. B sequences, L = prompt + T tokens."""

    attention_mask: Tensor  # [B, L] bool
    response_mask: Tensor  # [B, T] bool, True on sampled tokens

    @cached_property
    def inputs(self) -> Tensor:
        """[B, L] bool: the real tokens but the last of each sequence, which predicts nothing."""
        mask = self.attention_mask
        place = mask.cumsum(-1)
        return mask & ((place < place[:, -1:]) | (place == 1))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence that go into a forward."""
        return self.inputs.sum(-1).tolist()

    @cached_property
    def number(self) -> Tensor:
        """[B·T] int64: which response token of the whole rollout each one is, from 0."""
        return self.response_mask.flatten().cumsum(0) - 1


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a microbatch lie: b rows of w slots. All tensors are in host memory."""

    token_index: Tensor  # [b, w] int64, into the rollout's flat [B·L]; 0 where a slot is padding
    attention_mask: Tensor | None  # [b, w] bool; None where packed
    position_ids: Tensor | None  # [1, w] int64 where packed: restarts at 0 with each sequence
    own: Tensor  # [m] int64, the flat slots that are not padding
    state_index: Tensor  # [n] int64, the flat slot whose state predicts each response token
    response_index: Tensor  # [n] int64, into the rollout's flat [B·T]: those response tokens
    target_index: Tensor  # [n] int64, into the rollout's flat [B·L]: the same
    num_sequences: int

    @property
    def num_tokens(self) -> int:
        """Slots, padding counted."""
        return self.token_index.numel()


def cut(
    sequences: Sequences, rows: Tensor, microbatching: Microbatching, token_budget: int
) -> list[Layout]:
    """The microbatches of the sequences ``rows`` ([n] int64); the same every time it is asked."""
    if microbatching == "in_order":
        length = sequences.attention_mask.shape[1]
        parts = list(rows.split(max(1, token_budget // length)))
        return [lay_out_as_given(sequences, part) for part in parts]
    lengths = sequences.lengths
    order: list[int] = rows.tolist()
    if microbatching == "sorted":
        order.sort(key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    filled = token_budget
    for row in order:
        # The first of a sorted group is its longest: all are padded to that.
        size = lengths[groups[-1][0] if groups and microbatching == "sorted" else row]
        if filled + size > token_budget:
            groups.append([])
            filled, size = 0, lengths[row]
        groups[-1].append(row)
        filled += size
    packed = microbatching == "packed"
    return [lay_out(sequences, torch.tensor(group), packed=packed) for group in groups]


def lay_out(sequences: Sequences, rows: Tensor, *, packed: bool) -> Layout:
    """Sequences from the left edge of a row each, or one behind the other in a single row."""
    inputs = sequences.inputs[rows]
    length, prompt = inputs.shape[1], inputs.shape[1] - sequences.response_mask.shape[1]
    lengths = inputs.sum(-1)
    place = inputs.cumsum(-1) - 1
    if packed:
        start, shape = lengths.cumsum(0) - lengths, (1, int(lengths.sum()))
    else:
        width = int(lengths.max())
        start, shape = torch.arange(len(rows)) * width, (len(rows), width)
    slots = start[:, None] + place
    sequence, column = inputs.nonzero(as_tuple=True)
    own = slots[sequence, column]
    token_index = torch.zeros(shape, dtype=torch.long)
    token_index.view(-1)[own] = rows[sequence] * length + column
    answered, step = sequences.response_mask[rows].nonzero(as_tuple=True)
    return Layout(
        token_index=token_index,
        attention_mask=None if packed else torch.ones(shape, dtype=torch.bool),
        position_ids=place[sequence, column][None] if packed else None,
        own=own,
        state_index=slots[answered, prompt + step - 1],
        response_index=rows[answered] * sequences.response_mask.shape[1] + step,
        target_index=rows[answered] * length + prompt + step,
        num_sequences=len(rows),
    )


def lay_out_as_given(sequences: Sequences, rows: Tensor) -> Layout:
    """Sequences padded as in the rollout: prompts on the left, responses on the right."""
    mask = sequences.attention_mask[rows]
    (count, length), responses = mask.shape, sequences.response_mask.shape[1]
    answered, step = sequences.response_mask[rows].nonzero(as_tuple=True)
    return Layout(
        token_index=rows[:, None] * length + torch.arange(length),
        attention_mask=mask,
        position_ids=None,
        own=torch.arange(count * length),
        state_index=answered * length + (length - responses) + step - 1,
        response_index=rows[answered] * responses + step,
        target_index=rows[answered] * length + (length - responses) + step,
        num_sequences=count,
    )
