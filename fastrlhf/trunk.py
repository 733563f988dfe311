"""The decoder in two halves: the trunk, whose weights never change, and the layers above it.

The trunk's output is the same for every role and every PPO epoch, so it is computed once a rollout
and kept. Families whose decoder is `embed → layers → norm` with full attention are split; others
run whole: their "trunk" is the tokens themselves, and each role pays for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from .errors import UserError

__all__ = ["Decoder", "SplitDecoder", "WholeDecoder", "positions", "split_decoder"]

SPLIT_FAMILIES = ("llama", "qwen2", "qwen3")


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids of a left-padded batch: the first real token is at 0. [B, L] bool -> int64."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


RoleContext = Callable[[], AbstractContextManager]


class Decoder(Protocol):
    """What the backbone asks of a decoder."""

    split: int

    def trunk(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The part below the first trained layer: [B, L] tokens -> its output."""

    def top(
        self,
        trunk: Tensor,
        attention_mask: Tensor | None,
        role: RoleContext = nullcontext,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The part above: the trunk's output -> final hidden states after the norm, [B, L, D].

        ``role`` makes the context in which the caller runs this: a checkpointed layer is run again
        in the backward, when the caller's context is gone.
        """

    def recorded(self) -> AbstractContextManager[list[Tensor]]:
        """Collect the trunk's outputs of whatever the decoder runs within the block."""


class SplitDecoder:
    """A decoder entered at layer ``split``."""

    def __init__(
        self, decoder: PreTrainedModel, split: int, *, gradient_checkpointing: bool = False
    ):
        self.decoder = decoder
        self.split = split
        self.gradient_checkpointing = gradient_checkpointing

    @torch.no_grad()
    def trunk(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> Tensor:
        hidden = self.decoder.get_submodule("embed_tokens")(tokens)
        return self.run(hidden, attention_mask, position_ids, 0, self.split, nullcontext)

    def top(
        self,
        trunk: Tensor,
        attention_mask: Tensor | None,
        role: RoleContext = nullcontext,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        hidden = self.run(trunk, attention_mask, position_ids, self.split, None, role)
        return self.decoder.get_submodule("norm")(hidden)

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Within the block, every forward of the decoder adds its trunk's output to the list."""
        outputs: list[Tensor] = []
        first_trained = self.decoder.get_submodule("layers")[self.split]  # type: ignore[index]
        handle = first_trained.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
        try:
            yield outputs
        finally:
            handle.remove()

    def run(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        start: int,
        stop: int | None,
        role: RoleContext,
    ) -> Tensor:
        if position_ids is None:
            assert attention_mask is not None, "packed rows come with their position ids"
            position_ids = positions(attention_mask)
        mask = create_causal_mask(
            config=self.decoder.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotary = self.decoder.get_submodule("rotary_emb")(hidden, position_ids=position_ids)
        layers = self.decoder.get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        for layer in layers[start:stop]:

            def step(hidden: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(
                    hidden,
                    attention_mask=mask,
                    position_ids=position_ids,
                    position_embeddings=rotary,
                )

            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(
                    step,
                    hidden,
                    use_reentrant=False,
                    context_fn=lambda: (nullcontext(), role()),
                )
            else:
                hidden = step(hidden)
        return hidden


class WholeDecoder:
    """A decoder that is always run from the tokens up."""

    split = 0

    def __init__(self, decoder: PreTrainedModel):
        self.decoder = decoder

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        yield []

    def trunk(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> Tensor:
        return tokens

    def top(
        self,
        trunk: Tensor,
        attention_mask: Tensor | None,
        role: RoleContext = nullcontext,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if position_ids is None:
            assert attention_mask is not None, "packed rows come with their position ids"
            position_ids = positions(attention_mask)
        return self.decoder(
            input_ids=trunk,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state


def can_split(config: object) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return getattr(config, "model_type", None) in SPLIT_FAMILIES and kinds == {"full_attention"}


def split_decoder(
    decoder: PreTrainedModel, split: int, *, gradient_checkpointing: bool = False
) -> SplitDecoder | WholeDecoder:
    """The decoder entered at layer ``split`` where its family allows it, whole where not."""
    if can_split(decoder.config):
        return SplitDecoder(decoder, split, gradient_checkpointing=gradient_checkpointing)
    if gradient_checkpointing:
        raise UserError(
            "gradient_checkpointing needs a model that can be split "
            f"({', '.join(SPLIT_FAMILIES)}); "
            f"this one is {decoder.config.model_type}: turn it off"
        )
    return WholeDecoder(decoder)
