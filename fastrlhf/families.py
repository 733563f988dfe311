"""The families whose decoder can be entered at any layer: one row says what is particular to each.

A row says where the embedding, the layers, the norm and the rotary embedding are, and which
attention the layer of a given index has; with it, running the parts in order is transformers' own
forward to the last bit (tests/test_families.py). Dropout is left out (docs/math.md, 5.12).

Not split: attention that looks ahead (EmbeddingGemma) and layers that are neither full nor sliding
attention. Refused: sequences beyond the length at which LongRoPE changes the angles of every
position, since a sequence's states would then depend on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .errors import UserError

__all__ = ["FAMILIES", "SLIDING", "Family", "family_of"]

FULL, SLIDING = "full_attention", "sliding_attention"
MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


def all_full(config: PretrainedConfig) -> list[str]:
    return [FULL] * config.num_hidden_layers


def all_in_the_window(config: PretrainedConfig) -> list[str]:
    return [FULL if config.sliding_window is None else SLIDING] * config.num_hidden_layers


def as_listed(config: PretrainedConfig) -> list[str]:
    return list(config.layer_types)


@dataclass(frozen=True)
class Family:
    """Where a family's decoder keeps its parts, and what they are called with."""

    attention: Callable[[PretrainedConfig], list[str]] = all_full
    """The kind of attention of every layer of the whole model."""
    embedding: str = "embed_tokens"
    learned_positions: str | None = None
    """A table of positions that is added to the embedded tokens."""
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    rotary_by_attention: bool = False
    """Whether each kind of attention has rotary frequencies of its own."""
    cache_argument: str = "past_key_values"
    """What a layer calls the keys and values of earlier tokens."""

    def embed(self, decoder: nn.Module, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """What enters the first layer: [B, L] tokens -> [B, L, D]."""
        # Gemma's √D is in its embedding module.
        hidden = decoder.get_submodule(self.embedding)(tokens)
        if self.learned_positions is not None:
            hidden = hidden + decoder.get_submodule(self.learned_positions)(position_ids)
        return hidden

    def layers_of(self, decoder: nn.Module) -> nn.ModuleList:
        """The list of layers as it is now."""
        layers = decoder.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def norm_of(self, decoder: nn.Module) -> nn.Module:
        """The norm after the last layer."""
        return decoder.get_submodule(self.norm)

    def layer_inputs(
        self,
        decoder: PreTrainedModel,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
    ) -> list[dict[str, Any]]:
        """What each layer of the whole model is called with beside the hidden states.

        Args:
            hidden: [B, L, D], for its shape, dtype and device.
            attention_mask: [B, L] bool, or None: then positions that restart at 0 start a sequence
                of their own, to which attention keeps.
            position_ids: [B, L] int64.
        """
        if not hidden.is_meta:
            refuse_long_rope(decoder.config, position_ids)
        masks = {
            kind: make_mask(kind, decoder.config, hidden, attention_mask, position_ids)
            for kind in dict.fromkeys(self.attention(decoder.config))
        }
        return self.inputs_with(masks, decoder, hidden, position_ids)

    def inputs_with(
        self,
        masks: Mapping[str, Tensor | None],
        decoder: PreTrainedModel,
        hidden: Tensor,
        position_ids: Tensor,
    ) -> list[dict[str, Any]]:
        """`layer_inputs` with a mask for each kind of attention, as the attention in use reads."""
        kinds = self.attention(decoder.config)
        inputs = {}
        for kind in dict.fromkeys(kinds):
            inputs[kind] = {"attention_mask": masks[kind], "position_ids": position_ids}
            if self.rotary is not None:
                which = (kind,) if self.rotary_by_attention else ()
                angles = decoder.get_submodule(self.rotary)(hidden, position_ids, *which)
                inputs[kind]["position_embeddings"] = angles
        return [inputs[kind] for kind in kinds]


FAMILIES = {
    "gemma": Family(),
    "gemma2": Family(as_listed),
    "gemma3_text": Family(as_listed, rotary_by_attention=True),
    "gpt2": Family(embedding="wte", learned_positions="wpe", layers="h", norm="ln_f", rotary=None),
    "gpt_neox": Family(embedding="embed_in", norm="final_layer_norm", cache_argument="layer_past"),
    "llama": Family(),
    "mistral": Family(all_in_the_window),
    "phi3": Family(all_in_the_window),
    "qwen2": Family(as_listed),
    "qwen3": Family(as_listed),
    "smollm3": Family(as_listed),
}


def family_of(config: PretrainedConfig) -> Family | None:
    """The row of a decoder's configuration; None where it can only run whole."""
    family = FAMILIES.get(config.model_type)
    if family is None or getattr(config, "use_bidirectional_attention", None):
        return None
    return family if set(family.attention(config)) <= MASKS.keys() else None


def make_mask(
    kind: str,
    config: PretrainedConfig,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
) -> Any:
    """[B, 1, L, L], or what else the attention in use reads; None where its own causality does."""
    if hidden.is_meta:
        # Without data none can see that no mask is needed: the plan counts the one that may be.
        batch, length, _ = hidden.shape
        return torch.empty(batch, 1, length, length, dtype=torch.bool, device="meta")
    # flash-attn takes no block-diagonal mask: this is None there, and transformers' varlen call
    # finds the sequences in the position ids that the layer gets.
    return MASKS[kind](
        config=config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=position_ids,
    )


def refuse_long_rope(config: PretrainedConfig, position_ids: Tensor) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return
    limit = rope["original_max_position_embeddings"]
    if position_ids.shape[1] > limit and int(position_ids.max()) >= limit:
        raise UserError(
            f"this model's LongRoPE turns all positions differently beyond {limit} tokens, so what "
            f"was sampled would not be what is trained: keep prompt and response within {limit}"
        )
