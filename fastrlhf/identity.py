"""What a checkpoint must be given again to be gone on from: the same model and data.

A checkpoint holds what training changes. Of the rest it keeps digests: of the model's
configuration, of a few numbers of every frozen base weight (cheap, and two models differ in them),
of the shapes that train, and of the prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .backbone import SharedBackbone
from .data import PromptSet
from .errors import UserError

__all__ = ["identity", "refuse_others", "sampled"]

SAMPLES = 32  # numbers of each weight
VOLATILE = ("_name_or_path", "transformers_version")

MEANINGS = {
    "device": "was written on another kind of device",
    "config": "is of another model: its configuration differs",
    "base": "is of another model: the base's weights differ",
    "trained": "is of another model or way of training: the shapes of what trains differ",
    "prompts": "is of other prompts, or of a game with other rules",
}


def identity(backbone: SharedBackbone, prompts: Iterable[PromptSet]) -> dict[str, str]:
    """Digests of what a checkpoint does not hold, by the names of MEANINGS."""
    described = json.loads(backbone.model.config.to_json_string())
    for key in VOLATILE:
        described.pop(key, None)
    trained = [(n, list(p.shape)) for n, p in backbone.named_parameters() if p.requires_grad]
    return {
        "device": backbone.device.type,
        "config": digest(described),
        "base": base_digest(backbone),
        "trained": digest(trained),
        # Columns too: answers that rewards compare with.
        "prompts": digest([[each.rows, [list(x) for x in each.tokens]] for each in prompts]),
    }


def digest(described: Any) -> str:
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def base_digest(backbone: SharedBackbone) -> str:
    """Of the weights that neither train nor are in a checkpoint: adapters and heads are."""
    total = hashlib.sha256()
    for name, p in backbone.named_parameters():
        if p.requires_grad or "lora_" in name or "_head.linear" in name:
            continue
        picked = sampled(p).cpu()
        total.update(f"{name} {list(p.shape)} {p.dtype}".encode())
        total.update(picked.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def sampled(weight: Tensor) -> Tensor:
    """A few numbers of a weight, spread over it, [n]."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)].contiguous()


def refuse_others(where: str, kept: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise UserError where a checkpoint was made with another model, device or data."""
    for name, meaning in MEANINGS.items():
        if kept.get(name) != ours[name]:
            raise UserError(
                f"checkpoint {where} {meaning}; resume with what the run was started with"
            )
