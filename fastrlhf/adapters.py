"""LoRA adapters on one model: any number of them, of which a role picks what computes.

PEFT makes, names and writes them. Which of them compute is set on the layers themselves: PEFT's own
switch also changes which parameters require a gradient, and with it what the optimizer sees.

PEFT is imported with the first adapter. It imports bitsandbytes, and that torch's compiler: 55 MB
and seconds that full training has no use for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    from .adapter_file import AdapterFile

__all__ = ["Adapters", "LoraSettings", "carries_adapters"]


def carries_adapters(model: nn.Module) -> bool:
    """Whether there are adapters of PEFT on a model; there are none where PEFT is not imported."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(m, PeftModel | BaseTunerLayer) for m in model.modules())


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al. 2021) on every linear layer of the trained blocks."""

    rank: int = 16
    alpha: float = 32.0

    def for_layers(self, model: PreTrainedModel, layers: list[int]) -> LoraConfig:
        """PEFT's configuration for an adapter in ``layers`` of the model's decoder.

        No dropout (docs/math.md, 5.12).
        """
        from peft import LoraConfig

        decoder = model.get_decoder()
        # A linear layer that carries an adapter already is called base_layer within its wrapper.
        names = [n.removesuffix(".base_layer") for n, m in decoder.named_modules() if is_linear(m)]
        linear = {n.rpartition(".")[2] for n in names if "lora_" not in n}
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=sorted(linear),
            exclude_modules=outside(model, decoder, linear),
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in decoder.modules()),
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        )


def outside(model: nn.Module, decoder: nn.Module, linear: set[str]) -> str | None:
    """What excludes the linear layers beside the decoder that are named as ones in it, if any.

    A vision tower has layers with the same numbers and names.
    """
    prefix = next(name for name, m in model.named_modules() if m is decoder) + "."
    beside = [n for n, m in model.named_modules() if is_linear(m) and not n.startswith(prefix)]
    if not any(name.rpartition(".")[2] in linear for name in beside):
        return None
    return f"(?!{re.escape(prefix)}).*"


class Adapters:
    """The adapters of ``model``, by name. It is no module: what it adds is the model's own."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.peft: PeftModel | None = None
        self.layers: list[LoraLayer] = []

    def add(self, name: str, config: LoraConfig) -> None:
        """A new adapter that changes nothing yet: its second matrix is zero."""
        from peft import get_peft_model
        from peft.tuners.lora import LoraLayer

        from .lora_linear import fuse

        try:
            if self.peft is None:
                self.peft = get_peft_model(self.model, config, adapter_name=name)
            else:
                self.peft.add_adapter(name, config)
        except ValueError as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"PEFT makes no adapter for a {self.model.config.model_type} model ({reason}); "
                "set use_peft: false"
            ) from error
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        fuse(self.layers)

    @torch.no_grad()
    def copy(self, source: str, name: str) -> None:
        """A new adapter with the weights of another."""
        assert self.peft is not None
        config: Any = self.peft.peft_config[source]
        self.add(name, config)
        for ours, theirs in zip(self.parameters(name), self.parameters(source), strict=True):
            ours.copy_(theirs)

    def load(self, name: str, file: AdapterFile) -> None:
        """A new adapter with the weights of a file, which fits the model."""
        self.add(name, file.config)
        assert self.peft is not None
        device = next(self.parameters(name)).device  # none at all, where a run is planned
        state = {key: weight.to(device) for key, weight in file.state.items()}
        if differing := self.fill(name, state):
            raise UserError(
                f"the adapter in {file.folder} is not whole: its weights and its "
                f"adapter_config.json differ in {differing[0]}; save it again with PEFT"
            )

    def fill(self, name: str, state: dict[str, Tensor]) -> list[str]:
        """Give an adapter the weights of a file, in place; the names that only one of them has."""
        from peft import set_peft_model_state_dict

        assert self.peft is not None
        missed: Any = set_peft_model_state_dict(self.peft, state, adapter_name=name)
        absent = [key for key in missed.missing_keys if f".{name}." in key]
        return [*absent, *missed.unexpected_keys]

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The weights of one adapter."""
        for layer in self.layers:
            for kind in layer.adapter_layer_names:
                held = getattr(layer, kind)
                if name in held:
                    yield from held[name].parameters()

    def rank(self, name: str) -> int:
        """The rank of one adapter."""
        assert self.peft is not None
        config: Any = self.peft.peft_config[name]
        return config.r

    @contextmanager
    def active(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block exactly these adapters compute; after it what did before."""
        before = [(m._active_adapter, m._disable_adapters) for m in self.layers]
        for layer in self.layers:
            layer._active_adapter, layer._disable_adapters = list(names), not names
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(self.layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def save(self, folder: Path, names: Sequence[str]) -> None:
        """Write adapters in PEFT's format: "default" to ``folder``, others to folders in it."""
        if names:
            assert self.peft is not None
            self.peft.save_pretrained(
                str(folder), selected_adapters=list(names), save_embedding_layers=False
            )
