"""Trained weights on disk: adapters in PEFT's format, all else in safetensors.

| what trains | what is written |
|---|---|
| adapters | the policy's in the folder itself, every other role's in a folder of its name |
| the top layers | `trained_layers.safetensors`, under the model's own names |
| everything | the whole model, as transformers writes it |
| heads | `value_head.safetensors`, `reward_head.safetensors` |

A folder appears under its name only when all of it is written, so an interrupted save never leaves
half of one. Nothing is pickled.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import save_file

from .backbone import SharedBackbone
from .pretrained import replace_folder

__all__ = ["save_weights"]


def save_weights(backbone: SharedBackbone, folder: Path) -> Path:
    """Write what is the roles' own to ``folder``; returns it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        save_own_layers(backbone, made)
        names = [name for adapters in backbone.roles.values() for name in adapters]
        # PEFT reads the weights off the model that it adapted: in full training, the originals.
        with backbone.base.placed(originals=True):
            backbone.adapters.save(made, names)
        heads = {"value_head": backbone.value_head, "reward_head": backbone.reward_head}
        for name, head in heads.items():
            if head is not None:
                save_file(head.state_dict(), made / f"{name}.safetensors")
        replace_folder(made, folder)
    return folder


def save_own_layers(backbone: SharedBackbone, folder: Path) -> None:
    """Write what full training trained, if that is how the policy is trained."""
    if backbone.entire:
        backbone.model.save_pretrained(folder)
    elif backbone.lora is None:
        own = {id(p) for p in backbone.base.own()}
        with backbone.base.placed(originals=False):
            named = {k: p.detach() for k, p in backbone.model.named_parameters() if id(p) in own}
        save_file(named, folder / "trained_layers.safetensors")
