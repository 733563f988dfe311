"""The decoder in two halves: the trunk, whose weights never change, and the layers above it.

The trunk's output is the same for every role and every PPO epoch, so it is computed once a rollout
and kept. The families of families.py are split; others run whole: their "trunk" is the tokens
themselves, and each role pays for all layers.

Sequences come as padded rows, with a mask, or packed end to end in one row, without one: then the
position ids restart at 0 where a sequence starts, and attention stays within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import UserError
from .families import FAMILIES, Family, family_of

__all__ = ["Decoder", "SplitDecoder", "WholeDecoder", "positions", "split_decoder"]


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids of a left-padded batch: the first real token is at 0. [B, L] bool -> int64."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


# Makes the context in which a role computes. It may change what the decoder's layers and norm are,
# or yield another decoder of the same shape; one that yields None means the decoder as it is.
RoleContext = Callable[[], AbstractContextManager[Any]]
LayerWeights = Callable[[nn.Module], AbstractContextManager[Any]]


class Decoder(Protocol):
    """What the backbone asks of a decoder.

    Padded rows: attention_mask [B, L] bool, position_ids None. Packed rows: attention_mask None,
    position_ids [1, total].
    """

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

        This enters ``role``, and again in the backward for a layer that is checkpointed.
        """

    def top_together(
        self,
        trunk: Tensor,
        attention_mask: Tensor | None,
        roles: Sequence[RoleContext],
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """``[top(trunk, attention_mask, role, position_ids) for role in roles]``, no gradients."""

    def recorded(self) -> AbstractContextManager[list[Tensor]]:
        """Collect the trunk's outputs of whatever the decoder runs within the block."""


class SplitDecoder:
    """A decoder entered at layer ``split``.

    Args:
        family: what is particular to the decoder's family.
        gradient_checkpointing: recompute each layer above ``split`` in the backward.
        layer_weights: entered around a layer that several roles run one after the other, so that
            weights which are stored otherwise can be made ready once for all of them.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        split: int,
        family: Family,
        *,
        gradient_checkpointing: bool = False,
        layer_weights: LayerWeights = nullcontext,
    ):
        self.decoder = decoder
        self.split = split
        self.family = family
        self.gradient_checkpointing = gradient_checkpointing
        self.layer_weights = layer_weights

    @torch.no_grad()
    def trunk(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> Tensor:
        position_ids = self.positions(attention_mask, position_ids)
        hidden = self.family.embed(self.decoder, tokens, position_ids)
        inputs = self.layer_inputs(hidden, attention_mask, position_ids)
        layers = self.family.layers_of(self.decoder)
        for index in range(self.split):
            hidden = layers[index](hidden, **inputs[index])
        return hidden

    def top(
        self,
        trunk: Tensor,
        attention_mask: Tensor | None,
        role: RoleContext = nullcontext,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        inputs = self.layer_inputs(trunk, attention_mask, position_ids)
        recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
        hidden = trunk
        with self.entered(role) as decoder:
            layers = self.family.layers_of(decoder)
            for index in range(self.split, len(inputs)):
                run = recomputed(layers[index], role) if recomputes else layers[index]
                hidden = run(hidden, **inputs[index])
            return self.family.norm_of(decoder)(hidden)

    @torch.no_grad()
    def top_together(
        self,
        trunk: Tensor,
        attention_mask: Tensor | None,
        roles: Sequence[RoleContext],
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        inputs = self.layer_inputs(trunk, attention_mask, position_ids)
        hidden = [trunk for _ in roles]
        for index in range(self.split, len(inputs)):
            with ExitStack() as ready:
                seen: set[nn.Module] = set()
                for i, role in enumerate(roles):
                    with self.entered(role) as decoder:
                        layer = self.family.layers_of(decoder)[index]
                        # Roles share most layers; one that a role has for itself is another.
                        if layer not in seen:
                            seen.add(layer)
                            ready.enter_context(self.layer_weights(layer))
                        hidden[i] = layer(hidden[i], **inputs[index])
        for i, role in enumerate(roles):
            with self.entered(role) as decoder:
                hidden[i] = self.family.norm_of(decoder)(hidden[i])
        return hidden

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Within the block, every forward of the decoder adds its trunk's output to the list."""
        outputs: list[Tensor] = []
        layers = self.family.layers_of(self.decoder)
        top = layers[self.split] if self.split < len(layers) else self.family.norm_of(self.decoder)
        handle = top.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
        try:
            yield outputs
        finally:
            handle.remove()

    def positions(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        if position_ids is not None:
            return position_ids
        assert attention_mask is not None, "packed rows come with their position ids"
        return positions(attention_mask)

    def layer_inputs(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> list[dict[str, Any]]:
        position_ids = self.positions(attention_mask, position_ids)
        return self.family.layer_inputs(self.decoder, hidden, attention_mask, position_ids)

    @contextmanager
    def entered(self, role: RoleContext) -> Iterator[nn.Module]:
        with role() as decoder:
            yield self.decoder if decoder is None else decoder


def recomputed(layer: Callable[..., Tensor], role: RoleContext) -> Callable[..., Tensor]:
    """``layer``, which keeps its inputs alone and is run again in the backward, as ``role``."""
    return partial(
        checkpoint, layer, use_reentrant=False, context_fn=lambda: (nullcontext(), role())
    )


class WholeDecoder:
    """A decoder that is always run from the tokens up."""

    split = 0

    def __init__(self, decoder: PreTrainedModel, *, gradient_checkpointing: bool = False):
        self.decoder = decoder
        self.gradient_checkpointing = gradient_checkpointing

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
        if attention_mask is None:
            return self.top_of_packed(trunk, role, position_ids)
        with role() as chosen:
            decoder = self.decoder if chosen is None else chosen
            with self.checkpointed(decoder, role):
                return decoder(
                    input_ids=trunk,
                    attention_mask=attention_mask,
                    position_ids=positions(attention_mask),
                    use_cache=False,
                ).last_hidden_state

    def top_of_packed(
        self, tokens: Tensor, role: RoleContext, position_ids: Tensor | None
    ) -> Tensor:
        # Nothing is known of the family: a state that it carries along the row would cross from one
        # sequence into the next, so each gets a row of its own.
        assert position_ids is not None, "packed rows come with their position ids"
        column = position_ids[0]
        row = (column == 0).cumsum(0) - 1
        padded = tokens.new_zeros(int(row[-1]) + 1, int(column.max()) + 1)
        mask = torch.zeros_like(padded, dtype=torch.bool)
        padded[row, column] = tokens[0]
        mask[row, column] = True
        return self.top(padded, mask, role)[row, column][None]

    @torch.no_grad()
    def top_together(
        self,
        trunk: Tensor,
        attention_mask: Tensor | None,
        roles: Sequence[RoleContext],
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        return [self.top(trunk, attention_mask, role, position_ids) for role in roles]

    @contextmanager
    def checkpointed(self, decoder: nn.Module, role: RoleContext) -> Iterator[None]:
        """Within the block, the layers that transformers can checkpoint are run again in backward.

        transformers' own switch works in training mode only, which brings dropout along.
        """
        with ExitStack() as undo:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                for layer in checkpointable(decoder):
                    # What device maps hang on a layer is an attribute of its own, put back as such.
                    before = vars(layer).get("forward")
                    layer.forward = recomputed(layer.forward, role)
                    if before is None:
                        undo.callback(delattr, layer, "forward")
                    else:
                        undo.callback(setattr, layer, "forward", before)
            yield


def checkpointable(decoder: nn.Module) -> list[nn.Module]:
    return [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]


def split_decoder(
    decoder: PreTrainedModel,
    split: int,
    *,
    gradient_checkpointing: bool = False,
    layer_weights: LayerWeights = nullcontext,
) -> SplitDecoder | WholeDecoder:
    """The decoder entered at layer ``split`` where its family allows it, whole where not."""
    family = family_of(decoder.config)
    if family is not None:
        return SplitDecoder(
            decoder,
            split,
            family,
            gradient_checkpointing=gradient_checkpointing,
            layer_weights=layer_weights,
        )
    if gradient_checkpointing and not checkpointable(decoder):
        raise UserError(
            "gradient_checkpointing needs a model that can be split "
            f"({', '.join(FAMILIES)}) or that transformers can checkpoint; "
            f"this one is {decoder.config.model_type}: turn it off"
        )
    return WholeDecoder(decoder, gradient_checkpointing=gradient_checkpointing)
