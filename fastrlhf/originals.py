"""What the policy owns of a model's weights, and the frozen originals behind the other roles.

1. `Adapted`: it owns none; the originals are the model.
2. `OwnTop`: the top layers, the norm above them and an untied head. Two versions of these exist and
   the decoder holds one at a time: the policy's between roles, the originals while a role asks for
   them. They change places, so every weight is a parameter under exactly one name at any time.
3. `OwnModel`: everything; the originals are a second model.

Without originals (`keep=False`) full training computes as the policy alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import UserError
from .families import FAMILIES
from .heads import LanguageModelHead

__all__ = ["Adapted", "OwnModel", "OwnTop"]


class Adapted(nn.Module):
    """A model whose own weights never train."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        # Asking the model for its scale and cap takes a pass through its head: once, not each time
        # that the head is asked for. Its weights may move to another device: they are not kept.
        self.scaling = replace(LanguageModelHead.of(model), weight=torch.empty(0), bias=None)

    @property
    def adapted(self) -> PreTrainedModel:
        """The model on whose frozen weights adapters are."""
        return self.model

    def begin(self) -> None:
        """Let the policy have its own: what was done to the model so far was to the originals."""

    def own(self) -> list[nn.Parameter]:
        """The policy's own weights."""
        return []

    @contextmanager
    def placed(self, *, originals: bool) -> Iterator[PreTrainedModel]:
        """Within the block the decoder that it yields has the originals, or the policy's own."""
        yield self.model.get_decoder()

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        output = self.model.get_output_embeddings()
        return output.weight is self.model.get_input_embeddings().weight

    @property
    def head(self) -> LanguageModelHead:
        """The policy's head; its weight requires a gradient where it trains."""
        return self.scaling.through(self.model.get_output_embeddings())

    @property
    def reference_head(self) -> LanguageModelHead:
        """The head of the originals."""
        return self.head


class OwnTop(Adapted):
    """A model whose top ``top`` layers train with the norm above them and an untied head.

    A copy of these is made, which takes their place in `begin`; of the head only for a reference,
    because no other role reads it.
    """

    def __init__(self, model: PreTrainedModel, top: int, *, keep: bool, reference: bool):
        super().__init__(model)
        decoder = model.get_decoder()
        # In tuples, because a module as an attribute would be registered a second time.
        self.slots = top_parts(decoder, top)
        self.inside = keep
        self.other = nn.ModuleList()
        self.output: nn.Module | None = None
        if not keep:
            return
        # The layers' configuration is the model's: a switch of attention must reach both.
        shared = {id(decoder.config): decoder.config}
        for parent, name in self.slots:
            self.other.append(copy.deepcopy(parent.get_submodule(name), shared))
        if reference and not self.tied:
            self.output = copy.deepcopy(model.get_output_embeddings())

    def own(self) -> list[nn.Parameter]:
        with self.placed(originals=False):
            parts = [parent.get_submodule(name) for parent, name in self.slots]
        if not self.tied:
            parts.append(self.model.get_output_embeddings())
        return [p for part in parts for p in part.parameters()]

    @contextmanager
    def placed(self, *, originals: bool) -> Iterator[PreTrainedModel]:
        before = self.inside
        self.place(originals)
        try:
            yield self.model.get_decoder()
        finally:
            self.place(before)

    def place(self, originals: bool) -> None:
        """Put the originals into the decoder, or the policy's own."""
        if originals == self.inside or not self.other:
            return
        for i, (parent, name) in enumerate(self.slots):
            here = parent.get_submodule(name)
            parent._modules[name] = self.other[i]
            self.other[i] = here
        self.inside = originals

    def begin(self) -> None:
        self.place(False)

    @property
    def reference_head(self) -> LanguageModelHead:
        return self.head if self.output is None else self.scaling.through(self.output)


class OwnModel(Adapted):
    """A model all of whose weights train, beside a second one that never does.

    Args:
        original: the second model; None: a copy of ``model``.
    """

    def __init__(self, model: PreTrainedModel, original: PreTrainedModel | None, *, keep: bool):
        super().__init__(model)
        self.original = (original or copy.deepcopy(model)) if keep else None

    @property
    def adapted(self) -> PreTrainedModel:
        return self.original or self.model

    def own(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @contextmanager
    def placed(self, *, originals: bool) -> Iterator[PreTrainedModel]:
        yield (self.adapted if originals else self.model).get_decoder()

    @property
    def reference_head(self) -> LanguageModelHead:
        return self.scaling.through(self.adapted.get_output_embeddings())


def top_parts(decoder: PreTrainedModel, top: int) -> list[tuple[nn.Module, str]]:
    """Where the top ``top`` layers and what follows them are: modules and names in them.

    Raises:
        UserError: a decoder whose parts cannot be told.
    """
    depth = decoder.config.num_hidden_layers
    if family := FAMILIES.get(decoder.config.model_type):
        layers, above = family.layers_of(decoder), [family.norm]
    else:
        lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if len(lists) != 1:
            raise parts_unknown(decoder)
        layers = lists[0]
        above = names_after(decoder, layers[-1])
    return [*((layers, str(k)) for k in range(depth - top, depth)), *((decoder, n) for n in above)]


@torch.no_grad()
def names_after(decoder: PreTrainedModel, last: nn.Module) -> list[str]:
    """Which children of a decoder run after its last layer and have weights.

    Found by running one token: the order in which children are declared says nothing.
    """
    ran: list[str | None] = []  # None: the last layer
    hooks = [last.register_forward_hook(lambda *_: ran.append(None))]
    for name, child in decoder.named_children():
        if child is not decoder.get_input_embeddings() and any(True for _ in child.parameters()):
            hooks.append(child.register_forward_hook(lambda *_, n=name: ran.append(n)))
    decoder.eval()  # in training a decoder may skip layers
    try:
        decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=decoder.device))
    finally:
        for hook in hooks:
            hook.remove()
    if ran.count(None) != 1:
        raise parts_unknown(decoder)
    return [name for name in ran[ran.index(None) :] if name is not None]


def parts_unknown(decoder: PreTrainedModel) -> UserError:
    return UserError(
        f"the top layers of a {decoder.config.model_type} model cannot be told from the rest; "
        "train adapters (use_peft: true) or everything (train_layers: all)"
    )
