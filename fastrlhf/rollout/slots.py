"""Keys and values of the sequences that are being sampled, a row a slot, in buffers made once.

A sequence starts at column 0 of its slot, whatever is padded elsewhere: column is position, and
nothing of a sequence depends on what else is in the batch. The first n slots are in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SlotCache"]


class SlotCache:
    """What a layer's attention is handed as its cache; buffers are made as layers first write.

    Args:
        slots: sequences at a time.
        length: tokens of the longest sequence.
    """

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        # Of the forward that runs: where its new keys go, and how many columns it attends to.
        self.rows: Tensor | None = None
        self.sources: Tensor | None = None
        self.columns: Tensor | None = None
        self.width = 0

    def prompts_go_to(self, rows: Tensor, sources: Tensor) -> None:
        """The next forward is of whole prompts: its row sources[i] is kept in slot rows[i]."""
        self.rows, self.sources, self.columns = rows, sources, None

    def tokens_go_to(self, columns: Tensor, width: int) -> None:
        """The next forward is of one token for each of the first slots, at ``columns`` [n].

        width: columns that attention sees.
        """
        self.rows = torch.arange(len(columns), device=columns.device)
        self.sources, self.columns, self.width = None, columns, width

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new keys and values [b, heads, l, size]; what attention is to read."""
        if layer not in self.keys:
            for kept, given in ((self.keys, keys), (self.values, values)):
                _, heads, _, size = given.shape
                kept[layer] = given.new_empty(self.slots, heads, self.length, size)
                # Masked columns get no weight, but 0 times what memory held may be NaN.
                kept[layer].zero_()
        buffers = self.keys[layer], self.values[layer]
        assert self.rows is not None, "a forward outside the decode loop"
        if self.columns is None:
            assert self.sources is not None
            for buffer, given in zip(buffers, (keys, values), strict=True):
                buffer[:, :, : given.shape[2]].index_copy_(0, self.rows, given[self.sources])
            return keys, values
        for buffer, given in zip(buffers, (keys, values), strict=True):
            buffer[self.rows, :, self.columns] = given[:, :, 0]
        used = len(self.rows)
        return buffers[0][:used, :, : self.width], buffers[1][:used, :, : self.width]

    def copy(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Let each slot of ``targets`` have the first columns of its slot of ``sources``."""
        if not sources:
            return
        for kept in (self.keys, self.values):
            for buffer in kept.values():
                source, target = (torch.tensor(x, device=buffer.device) for x in (sources, targets))
                columns = buffer[:, :, :width]
                columns.index_copy_(0, target, columns.index_select(0, source))

    def is_empty(self) -> bool:
        """Whether nothing was ever written."""
        return not self.keys

    def numbers(self) -> list[Tensor]:
        """All buffers."""
        return [*self.keys.values(), *self.values.values()]
