"""Trained weights on disk: the adapter in PEFT's format, the value head in safetensors.

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
    """Write the adapters and the critic's head to ``folder``; returns it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        backbone.save_adapters(made)
        if backbone.value_head is not None:
            save_file(backbone.value_head.state_dict(), made / "value_head.safetensors")
        replace_folder(made, folder)
    return folder
