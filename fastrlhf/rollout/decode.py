"""Prompts in, a Rollout out: a decode loop that keeps what sampling already computed.

One weight copy (the backbone as policy), a preallocated key-value cache, and for every sampled
token its log-probability under the distribution that it was drawn from. The frozen layers' outputs
are kept, so that scoring and updates need not run them again. A response ends at the stop
token, which belongs to it and is trained; what follows is padding, told by the mask alone (the
padding token may equal the stop token).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from fastrlhf_kernels import sample

from ..backbone import SharedBackbone
from ..trunk import positions
from ..trunk_cache import TrunkCache
from ..types import Prompts, Rollout

__all__ = ["DecodeEngine"]


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


class DecodeEngine:
    """Samples responses from the policy.

    Args:
        backbone, tokenizer: the model and its tokenizer.
        response_length: tokens sampled at most.
        temperature: divides the logits.
        stops: whether the end-of-sequence token ends a response.
        trunk_cache: whether the frozen layers' outputs are kept.
        trunk_cache_mb: megabytes of them kept on the device; None: all.
    """

    def __init__(
        self,
        backbone: SharedBackbone,
        tokenizer: Any,
        *,
        response_length: int,
        temperature: float = 1.0,
        stops: bool = True,
        trunk_cache: bool = True,
        trunk_cache_mb: int | None = None,
    ):
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.response_length = response_length
        self.temperature = temperature
        self.stops = stops
        # With nothing below the first trained layer there is nothing worth keeping.
        self.keeps_trunk = trunk_cache and backbone.halves.split > 0
        self.trunk_cache_mb = trunk_cache_mb

    @torch.no_grad()
    def generate(self, prompts: Prompts, generator: torch.Generator) -> Rollout:
        """One response for every prompt, drawn with ``generator``."""
        batch, start = prompts.tokens.shape
        length = start + self.response_length
        device = prompts.tokens.device
        tokens = torch.full((batch, length), self.tokenizer.pad_token_id, device=device)
        tokens[:, :start] = prompts.tokens
        mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
        mask[:, :start] = prompts.attention_mask
        logprobs = torch.zeros(batch, self.response_length, device=device)
        ended = torch.zeros(batch, dtype=torch.bool, device=device)

        kept: TrunkCache | None = None
        with self.backbone.role("policy") as decoder, self.recorded() as outputs:
            cache = self.new_cache(length)
            new = prompts.tokens
            for t in range(self.response_length):
                here = start + t
                hidden = decoder(
                    input_ids=new,
                    attention_mask=mask[:, :here],
                    position_ids=positions(mask[:, :here])[:, -new.shape[1] :],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
                for states in outputs:
                    kept = kept or self.new_trunk_cache(states, length)
                    # The last token's state predicts nothing: it is never computed.
                    kept.write_columns(here - states.shape[1], states)
                outputs.clear()
                drawn, drawn_logprobs = sample(
                    self.backbone.head.logits(hidden),
                    temperature=self.temperature,
                    top_k=0,
                    top_p=1.0,
                    generator=generator,
                )
                tokens[:, here] = torch.where(ended, self.tokenizer.pad_token_id, drawn)
                logprobs[:, t] = torch.where(ended, 0.0, drawn_logprobs)
                mask[:, here] = ~ended
                if self.stops:
                    ended |= drawn == self.tokenizer.eos_token_id
                    if ended.all():
                        break
                new = tokens[:, here : here + 1]
        return self.finish(prompts, tokens, mask, logprobs, ended, kept)

    def recorded(self) -> AbstractContextManager[list[Tensor]]:
        return self.backbone.halves.recorded() if self.keeps_trunk else nullcontext([])

    def new_trunk_cache(self, like: Tensor, length: int) -> TrunkCache:
        return TrunkCache(
            like.shape[0], length, like.shape[-1], dtype=like.dtype, device=like.device,
            budget_mb=self.trunk_cache_mb,
        )  # fmt: skip

    def new_cache(self, length: int) -> Cache:
        depth = self.backbone.decoder.config.num_hidden_layers
        return Cache(layers=[PreallocatedLayer(length) for _ in range(depth)])

    def finish(
        self,
        prompts: Prompts,
        tokens: Tensor,
        mask: Tensor,
        logprobs: Tensor,
        ended: Tensor,
        trunk: TrunkCache | None,
    ) -> Rollout:
        start = prompts.tokens.shape[1]
        response_mask = mask[:, start:].clone()
        texts = [
            self.tokenizer.decode(row[kept], skip_special_tokens=True)
            for row, kept in zip(tokens[:, start:], response_mask, strict=True)
        ]
        return Rollout(prompts, texts, tokens, mask, response_mask, logprobs, ended, trunk)
