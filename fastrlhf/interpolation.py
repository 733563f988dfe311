"""Policies between trained ones: adapters whose change of the base is the weighted sum of theirs.

    ΔW = Σ_i weights_i · scale_i · B_i A_i = [weights_i · scale_i · B_i]_i · [A_i]_i

Rewarded soups (Ramé et al. 2023) interpolate weights of models. Deviation where these are LoRA
adapters: the factors A and B are not interpolated, since the product of two interpolations has
cross terms, A_1 with B_2, that no training has seen. They are put side by side, which is exact; the
rank of what is made is the sum of the ranks. (It is what PEFT calls `combination_type="cat"`.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from .adapter_file import WEIGHTS, AdapterFile
from .checkpoint import in_place
from .errors import UserError

__all__ = ["interpolate", "save_interpolated"]


def save_interpolated(
    folders: Sequence[str | Path], weights: Sequence[float], output: Path
) -> Path:
    """Write the adapter between those in ``folders`` to ``output``, in PEFT's format.

    Args:
        weights: of each adapter; they need not add up to 1.

    Raises:
        UserError: no adapter there, or adapters that were not made for the same layers.
    """
    config, state = interpolate([AdapterFile.open(folder) for folder in folders], weights)
    with in_place(output) as made:
        config.save_pretrained(str(made))
        save_file(state, made / WEIGHTS)
    return output


@torch.no_grad()
def interpolate(
    adapters: Sequence[AdapterFile], weights: Sequence[float]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the weights of the adapter between others; ranks may differ.

    Raises:
        UserError: adapters of other bases or layers, or ones whose rank depends on the layer.
    """
    check_alike(adapters)
    state: dict[str, Tensor] = {}
    for key, first in adapters[0].state.items():
        parts = [adapter.state[key].float() for adapter in adapters]
        if ".lora_A." in key:
            joined = torch.cat(parts, dim=0)
        else:
            scaled = [w * scale_of(a.config) for w, a in zip(weights, adapters, strict=True)]
            joined = torch.cat([s * x for s, x in zip(scaled, parts, strict=True)], dim=1)
        state[key] = joined.to(first.dtype).contiguous()
    config = copy.copy(adapters[0].config)
    # Scaled by alpha / rank = 1: the scales of the parts are in B already.
    config.r = sum(adapter.config.r for adapter in adapters)
    config.lora_alpha, config.use_rslora = config.r, False
    config.inference_mode = True
    return config, state


def scale_of(config: LoraConfig) -> float:
    """What an adapter's product B·A is multiplied by."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def check_alike(adapters: Sequence[AdapterFile]) -> None:
    first = adapters[0]
    for adapter in adapters:
        if adapter.config.rank_pattern or adapter.config.alpha_pattern:
            raise UserError(
                f"the adapter in {adapter.folder} has other ranks in other layers; give one with "
                "the same rank in all"
            )
        bases = [x.config.base_model_name_or_path for x in (first, adapter)]
        if bases[0] != bases[1]:
            raise UserError(
                f"the adapter in {first.folder} was trained on {bases[0]} and that in "
                f"{adapter.folder} on {bases[1]}; give two of one base"
            )
        if odd := sorted(first.state.keys() ^ adapter.state.keys()):
            raise UserError(
                f"the adapters in {first.folder} and {adapter.folder} are not in the same layers "
                f"(only one has {odd[0]}); train both with the same train_layers"
            )
        for key, ours in first.state.items():
            side = 1 if ".lora_A." in key else 0
            if ours.shape[side] != adapter.state[key].shape[side]:
                raise UserError(
                    f"the adapters in {first.folder} and {adapter.folder} are of models of "
                    f"different widths ({key}); give two of one base"
                )
