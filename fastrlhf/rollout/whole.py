"""The decode loop for decoders that can only run whole: transformers' forward, one step for all.

The sequences of a batch stay side by side until the last one ends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ..trunk import positions
from .draft import Draft, refuse_broken
from .loop import Draw

__all__ = ["PreallocatedLayer", "decode_whole", "new_cache"]


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, written into a buffer made once for the longest sequence."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)

        def buffer(like: Tensor) -> Tensor:
            batch, heads, _, size = like.shape
            return like.new_empty(batch, heads, self.length, size)

        self.key_buffer, self.value_buffer = buffer(key_states), buffer(value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        self.key_buffer[:, :, self.filled : end] = key_states
        self.value_buffer[:, :, self.filled : end] = value_states
        self.filled = end
        self.keys = self.key_buffer[:, :, :end]
        self.values = self.value_buffer[:, :, :end]
        return self.keys, self.values


def new_cache(decoder: PreTrainedModel, length: int) -> Cache:
    """Keys and values of every layer, for sequences of at most ``length`` tokens."""
    depth = decoder.config.num_hidden_layers
    return Cache(layers=[PreallocatedLayer(length) for _ in range(depth)])


def forward(decoder: PreTrainedModel, cache: Cache, tokens: Tensor, mask: Tensor) -> Tensor:
    """The state after the newest tokens: [b, l] and the mask of all so far, [b, L] -> [b, D]."""
    return decoder(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions(mask)[:, -tokens.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]


def decode_whole(
    decoder: PreTrainedModel,
    draft: Draft,
    draw: Draw,
    *,
    rows: Tensor,
    stop: int | None,
    padding: int,
) -> None:
    """Sample the responses of the sequences ``rows`` ([b] int64) of a draft."""
    start = draft.start
    cache = new_cache(decoder, draft.length)
    mask = draft.mask[rows]
    new = draft.tokens[rows, :start]
    going = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for t in range(draft.logprobs.shape[1]):
        here = start + t
        hidden = forward(decoder, cache, new, mask[:, :here])
        drawn, logprobs = draw(hidden, draft.uniform[rows, t])
        refuse_broken(drawn[going].tolist())
        mask[:, here] = going
        now = rows[going]
        draft.add(now, torch.full_like(now, t), drawn[going], logprobs[going])
        if stop is not None:
            draft.ended[rows] |= going & (drawn == stop)
            going = going & (drawn != stop)
            if not going.any():
                break
        new = torch.where(going, drawn, padding)[:, None]
