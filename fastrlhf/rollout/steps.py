"""Two forwards that sampling is made of: whole prompts, and one token for every sequence.

The family's own layers are run one after the other (families.py), with what transformers' forward
makes anew at each step made here: masks, angles and positions once for all layers. Linear layers
multiply few rows in the way that is fastest for them (fastrlhf_kernels.few_rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf_kernels.few_rows import few_rows_linear

from ..families import SLIDING, Family
from .slots import SlotCache

__all__ = ["FamilySteps", "States", "few_row_products"]

# What reads a mask that is added to the scores; flash-attn reads none.
ATTENTION = ("sdpa", "eager")


class States(NamedTuple):
    """What a forward leaves behind."""

    last: Tensor  # [b, D] after the norm, of each row's last token
    trunk: Tensor | None  # [b, l, D] what entered the first trained layer


class FamilySteps:
    """The forwards of ``decoder``, which is to compute as the policy while they run.

    Args:
        split: the first trained layer; 0: no states below it are kept.
    """

    def __init__(self, decoder: PreTrainedModel, family: Family, cache: SlotCache, split: int):
        self.decoder, self.family, self.cache, self.split = decoder, family, cache, split

    @staticmethod
    def can_run(decoder: PreTrainedModel) -> bool:
        return decoder.config._attn_implementation in ATTENTION

    def prompts(self, tokens: Tensor, lengths: Tensor, rows: Tensor, sources: Tensor) -> States:
        """Whole prompts, padded on the right, where no real token sees the padding.

        Args:
            tokens: [p, w] int64.
            lengths: [p] int64, real tokens of each.
            rows, sources: [s] int64: slot rows[i] gets the keys and values of prompt sources[i].
        """
        position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
        position_ids = position_ids.expand(tokens.shape)
        hidden = self.family.embed(self.decoder, tokens, position_ids)
        inputs = self.family.layer_inputs(self.decoder, hidden, None, position_ids)
        self.cache.prompts_go_to(rows, sources)
        places = torch.arange(len(tokens), device=tokens.device), lengths - 1
        return self.run(hidden, inputs, lambda hidden: hidden[places])

    def tokens(self, tokens: Tensor, columns: Tensor, width: int) -> States:
        """The next token ([n] int64) of the first n slots, at ``columns`` [n] < ``width``."""
        position_ids = columns[:, None]
        hidden = self.family.embed(self.decoder, tokens[:, None], position_ids)
        masks = self.masks(hidden.dtype, columns, width)
        inputs = self.family.inputs_with(masks, self.decoder, hidden, position_ids)
        self.cache.tokens_go_to(columns, width)
        return self.run(hidden, inputs, lambda hidden: hidden[:, 0])

    def run(
        self, hidden: Tensor, inputs: list[dict[str, Any]], last: Callable[[Tensor], Tensor]
    ) -> States:
        trunk = None
        cache = {self.family.cache_argument: self.cache}
        for index, layer in enumerate(self.family.layers_of(self.decoder)):
            if index == self.split and index:
                trunk = hidden
            hidden = layer(hidden, **inputs[index], **cache, use_cache=True)
        return States(self.family.norm_of(self.decoder)(last(hidden)), trunk)

    def masks(self, dtype: torch.dtype, columns: Tensor, width: int) -> Mapping[str, Tensor]:
        """[n, 1, 1, width] of 0 and a very low number, for each kind of attention."""
        config = self.decoder.config
        places = torch.arange(width, device=columns.device)
        behind = columns[:, None] - places
        masks = {}
        for kind in dict.fromkeys(self.family.attention(config)):
            hides = behind < 0
            if kind == SLIDING:
                hides = hides | (behind >= config.sliding_window)
            mask = torch.zeros(hides.shape, dtype=dtype, device=columns.device)
            masks[kind] = mask.masked_fill_(hides, torch.finfo(dtype).min)[:, None, None]
        return masks


@contextmanager
def few_row_products(decoder: nn.Module) -> Iterator[None]:
    """Within the block, float32 linear layers on a CPU multiply few rows with a kernel for them."""
    changed: list[nn.Module] = []
    for module in decoder.modules():
        forward = few_rows_forward(module)
        if forward is not None:
            module.forward = forward
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def few_rows_forward(module: Any) -> Callable[[Tensor], Tensor] | None:
    """How ``module`` computes for few rows; None: as ever."""
    if "forward" in vars(module):
        return None
    # An adapter's layer comes before its base's in `modules()`, so the base is still as it was.
    if hasattr(module, "few_rows_forward"):
        return module.few_rows_forward if takes_few_rows(module.get_base_layer()) else None
    return partial(multiply, module) if takes_few_rows(module) else None


def takes_few_rows(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a float32 linear layer on a CPU, computing as such layers do."""
    # A subclass multiplies in its own way, and so does what was given another forward.
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return module.weight.dtype == torch.float32 and not module.weight.is_cuda


def multiply(linear: nn.Linear, x: Tensor) -> Tensor:
    return few_rows_linear(x, linear.weight, linear.bias)
