"""Prompts in, a Rollout out: a decode loop that keeps what sampling already computed.

One weight copy (the backbone as policy), keys and values in buffers made once, and for every
sampled token its log-probability under the distribution that it was drawn from. The frozen layers'
outputs are kept, so that scoring and updates need not run them again. A response ends at the stop
token, which belongs to it and is trained; what follows is padding, told by the mask alone (the
padding token may equal the stop token).

Token t of sequence b is drawn with the uniform number u[b, t], all of which are drawn first: what a
sequence says does not depend, beyond rounding, on what else is sampled beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf_kernels import sample

from ..backbone import SharedBackbone
from ..errors import SelfCheckError
from ..families import Family
from ..trunk import SplitDecoder
from ..types import Prompts, Rollout
from .cuda_graph import GraphedSteps, can_record
from .draft import BROKEN, Draft
from .loop import SlotLoop
from .slots import SlotCache
from .steps import FamilySteps, few_row_products
from .whole import decode_whole

__all__ = ["DecodeEngine"]


class DecodeEngine:
    """Samples responses from the policy.

    Args:
        backbone, tokenizer: the model and its tokenizer.
        response_length: tokens sampled at most.
        temperature: divides the logits.
        stops: whether the end-of-sequence token ends a response.
        trunk_cache: whether the frozen layers' outputs are kept.
        trunk_cache_mb: megabytes of them kept on the device; None: all.
        slots: sequences sampled at a time; None: all.
        cuda_graphs: whether steps are replayed as CUDA graphs where they can be (`can_record`).
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
        slots: int | None = None,
        cuda_graphs: bool = False,
    ):
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.response_length = response_length
        self.temperature = temperature
        # The token that ends a response.
        self.stop = tokenizer.eos_token_id if stops else None
        # With nothing below the first trained layer there is nothing worth keeping.
        self.keeps_trunk = trunk_cache and backbone.halves.split > 0
        self.trunk_cache_mb = trunk_cache_mb
        self.slots = slots
        self.cuda_graphs = cuda_graphs

    @torch.no_grad()
    def generate(self, prompts: Prompts, generator: torch.Generator) -> Rollout:
        """One response for every prompt, drawn with ``generator``."""
        padding = self.tokenizer.pad_token_id
        draft = Draft.of(prompts, self.response_length, padding, generator)
        stop = self.stop
        with self.backbone.role("policy") as decoder, few_row_products(decoder):
            if (family := self.family(decoder)) is not None:
                steps = self.steps(decoder, family, self.new_cache(len(prompts), draft.length))
                if self.cuda_graphs and can_record(self.backbone):
                    steps = GraphedSteps(steps)
                budget_mb = self.trunk_cache_mb
                SlotLoop(steps, draft, self.draw, stop=stop, budget_mb=budget_mb).run()
            else:
                order = torch.arange(len(prompts), device=prompts.tokens.device)
                for rows in order.split(self.slots or len(prompts)):
                    decode_whole(decoder, draft, self.draw, rows=rows, stop=stop, padding=padding)
        return draft.finish(self.tokenizer)

    def family(self, decoder: PreTrainedModel) -> Family | None:
        """What is particular to the decoder; None where it can only run whole."""
        halves = self.backbone.halves
        if isinstance(halves, SplitDecoder) and FamilySteps.can_run(decoder):
            return halves.family
        return None

    def steps(self, decoder: PreTrainedModel, family: Family, cache: SlotCache) -> FamilySteps:
        split = self.backbone.halves.split if self.keeps_trunk else 0
        return FamilySteps(decoder, family, cache, split)

    def new_cache(self, sequences: int, length: int) -> SlotCache:
        # It is gone when the rollout is done: scoring and update have its memory.
        return SlotCache(min(self.slots or sequences, sequences), length)

    def draw(self, hidden: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Final states [n, D] -> tokens [n] and their log-probabilities [n]."""
        logits = self.backbone.head.logits(hidden)
        try:
            return sample(logits, temperature=self.temperature, uniform=uniform)
        except ValueError as error:  # on a CPU; on a GPU the loops see it
            raise SelfCheckError(BROKEN) from error
