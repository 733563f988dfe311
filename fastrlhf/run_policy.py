"""The policy that a run has trained, beside the one it began from.

| the run trained | its checkpoint holds | the reference |
|---|---|---|
| adapters | an adapter in PEFT's format | the base, or the adapter that training began from |
| the top layers | `trained_layers.safetensors` | their originals |
| everything | a whole model | the model that training began from |
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from .adapter_file import WEIGHTS
from .adapters import LoraSettings
from .backbone import SharedBackbone
from .config import PPOConfig
from .errors import UserError, nearest
from .pretrained import Pretrained

__all__ = ["find_checkpoint", "load_policy"]

TOP_LAYERS = "trained_layers.safetensors"
WHOLE = "config.json"


def find_checkpoint(run: Path, name: str | None) -> Path:
    """The folder of a checkpoint: ``name``, else the best, the final or the newest one.

    Raises:
        UserError: none of that name, or none at all.
    """
    folders = [p for p in (run / "checkpoints").glob("*") if p.is_dir()]
    held = {
        p.name: p for p in folders if any((p / x).exists() for x in (WEIGHTS, TOP_LAYERS, WHOLE))
    }
    if not held:
        raise UserError(f"the run in {run} has no checkpoint yet; wait until it has saved one")
    if name is not None:
        if name not in held:
            raise UserError(f"the run in {run} has no checkpoint {name!r}; {nearest(name, held)}")
        return held[name]
    for preferred in ("best", "final"):
        if preferred in held:
            return held[preferred]
    return max(held.values(), key=lambda folder: folder.stat().st_mtime)


def load_policy(
    source: Pretrained, checkpoint: Path, config: PPOConfig, device: str
) -> SharedBackbone:
    """The policy of ``checkpoint`` on the model that its run started from.

    Args:
        source: the model of the run's settings, ``config``.

    Raises:
        UserError: weights of another model, or ones that cannot be read.
    """
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    given: dict[str, Any] = dict(dtype=dtype, device=device, critic=None)
    if (checkpoint / WEIGHTS).exists():
        backbone = SharedBackbone.load(
            source,
            lora=LoraSettings(config.lora_rank, config.lora_alpha),
            train_layers=config.train_layers,
            quantization=config.quantization,
            adapter=checkpoint,
            **given,
        )
        began = checkpoint / "reference"
        if (began / WEIGHTS).exists():
            state = read_weights(began / WEIGHTS)
            set_peft_model_state_dict(backbone.adapters.peft, state, adapter_name="reference")
        else:
            # What training came to is no reference: what it began from is, the base.
            backbone.roles["reference"] = ()
        return backbone
    if (checkpoint / TOP_LAYERS).exists():
        backbone = SharedBackbone.load(source, lora=None, train_layers=config.train_layers, **given)
        put_layers(backbone, checkpoint / TOP_LAYERS)
        return backbone
    trained = replace(source, name=str(checkpoint), source=str(checkpoint))
    reference = source.load(dtype=dtype, device=device)
    return SharedBackbone.load(
        trained,
        lora=None,
        train_layers="all",
        reference_model=reference,
        **given,
    )


@torch.no_grad()
def put_layers(backbone: SharedBackbone, path: Path) -> None:
    """Let the policy's own layers be those of the file ``path``."""
    state = read_weights(path)
    own = {id(p) for p in backbone.base.own()}
    with backbone.base.placed(originals=False):
        named = {k: p for k, p in backbone.model.named_parameters() if id(p) in own}
    shapes = {k: p.shape for k, p in named.items()}
    if shapes != {k: p.shape for k, p in state.items()}:
        odd = sorted(shapes.keys() ^ state.keys()) or ["their shapes"]
        raise UserError(
            f"{path} is not of this model: they differ in {odd[0]}; give the run's own model"
        )
    for name, parameter in named.items():
        parameter.copy_(state[name])


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); give another --checkpoint") from error
