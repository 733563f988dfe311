"""The decoding step as CUDA graphs: one launch a step, instead of one for each kernel.

A graph is of fixed shapes: rows and columns are rounded up to buckets, and the first step in a
bucket records its graph. A row too many writes one key and value into a slot that nobody uses, at
column 0, which the prompt that gets the slot writes anew. Graphs hold the addresses of one
rollout's cache, and are gone with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone import SharedBackbone
from ..quantization import is_quantized
from .steps import FamilySteps, States

__all__ = ["GraphedSteps", "can_record"]

COLUMNS = 128
"""Cache columns are rounded up to multiples of this."""

Record = Callable[[Callable[[], States]], tuple[States, Callable[[], None]]]


class Recorded(NamedTuple):
    """A graph and the memory that it reads and writes."""

    tokens: Tensor  # [n] int64
    columns: Tensor  # [n] int64
    states: States  # of n rows, overwritten by each replay
    replay: Callable[[], None]


def can_record(backbone: SharedBackbone) -> bool:
    """Whether the step is the same kernels at every position, on a GPU."""
    rope = getattr(backbone.decoder.config, "rope_parameters", None) or {}
    # These look at the positions, on the host.
    changes = any(kind in str(rope) for kind in ("dynamic", "longrope"))
    return backbone.device.type == "cuda" and not changes and not is_quantized(backbone.model)


def record(run: Callable[[], States]) -> tuple[States, Callable[[], None]]:
    """The states that ``run`` returns, and what computes them again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries make their workspaces, which no graph may
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = run()
    return states, graph.replay


class GraphedSteps(FamilySteps):
    """The forwards of ``steps``; that of single tokens is replayed.

    Args:
        record: makes a graph of a function.
    """

    def __init__(self, steps: FamilySteps, record: Record = record):
        super().__init__(steps.decoder, steps.family, steps.cache, steps.split)
        self.record = record
        self.graphs: dict[tuple[int, int], Recorded] = {}

    def tokens(self, tokens: Tensor, columns: Tensor, width: int) -> States:
        """As `FamilySteps.tokens`; the states are overwritten by the next step."""
        count = len(tokens)
        rows = min(1 << (count - 1).bit_length(), self.cache.slots)
        width = min(-(-width // COLUMNS) * COLUMNS, self.cache.length)
        fresh = (rows, width) not in self.graphs
        if fresh:
            memory = torch.zeros_like(tokens[:1]).repeat(rows), columns.new_zeros(rows)
        else:
            memory = self.graphs[rows, width][:2]
        for kept, given in zip(memory, (tokens, columns), strict=True):
            kept[:count] = given
            kept[count:] = 0
        if fresh:
            step = super().tokens
            states, replay = self.record(lambda: step(*memory, width))
            self.graphs[rows, width] = Recorded(*memory, states, replay)
        graph = self.graphs[rows, width]
        graph.replay()
        last, trunk = graph.states
        return States(last[:count], None if trunk is None else trunk[:count])
