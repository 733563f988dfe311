"""What a checkpoint must be given again to be gone on from: the same model, data and settings.

A checkpoint holds what training changes. Of the rest it keeps digests: of the model's
configuration, of a few numbers of every frozen base weight (cheap, and two models differ in them),
of the shapes that train, and of the prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .backbone import SharedBackbone
from .config import PPOConfig
from .data import PromptSet
from .errors import UserError

__all__ = ["check_settings_kept", "identity", "refuse_others"]

SAMPLES = 32  # numbers of each weight
VOLATILE = ("_name_or_path", "transformers_version")

# Settings that a resumed run may change: the numbers of training are the same with them.
FREE = (
    "output_dir", "eval_steps", "num_samples", "save_steps", "save_total_limit", "save_best",
    "max_skipped_steps", "report_to", "audit", "trunk_cache_mb",
)  # fmt: skip
# These change rounding alone; they are what helps where memory ran out.
ROUNDING = ("microbatch_tokens", "workspace_mb", "trunk_cache", "gradient_checkpointing")

MEANINGS = {
    "device": "was written on another kind of device",
    "config": "is of another model: its configuration differs",
    "base": "is of another model: the base's weights differ",
    "trained": "is of another model or way of training: the shapes of what trains differ",
    "prompts": "is of other prompts: the data set has changed",
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
        "prompts": digest([[list(ids) for ids in each.tokens] for each in prompts]),
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
        flat = p.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        picked = flat[::step].contiguous().cpu()
        total.update(f"{name} {list(p.shape)} {p.dtype}".encode())
        total.update(picked.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def refuse_others(where: str, kept: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise UserError where a checkpoint was made with another model, device or data."""
    for name, meaning in MEANINGS.items():
        if kept.get(name) != ours[name]:
            raise UserError(
                f"checkpoint {where} {meaning}; resume with what the run was started with"
            )


def check_settings_kept(where: str, kept: PPOConfig, ours: PPOConfig) -> list[str]:
    """Whether a run with the settings ``kept`` can go on with ``ours``.

    Returns:
        The settings that differ and change rounding, and no more.

    Raises:
        UserError: settings that would make it another run.
    """
    before, after = dataclasses.asdict(kept), dataclasses.asdict(ours)
    differ = [name for name in before if before[name] != after[name] and name not in FREE]
    if "total_episodes" in differ:
        check_length(where, kept, ours)
        differ.remove("total_episodes")
    changed = [name for name in differ if name not in ROUNDING]
    if changed:
        listed = ", ".join(f"{n} (it is {before[n]!r}, not {after[n]!r})" for n in changed)
        raise UserError(
            f"{where} cannot go on with another {listed}: it would be another run; leave "
            f"{'it' if len(changed) == 1 else 'them'} out, or start a new run"
        )
    return differ


def check_length(where: str, kept: PPOConfig, ours: PPOConfig) -> None:
    if kept.lr_scheduler_type != "constant":
        raise UserError(
            f"{where} cannot go on with total_episodes {ours.total_episodes}: its learning rate "
            f"falls to zero at {kept.total_episodes}, so every step would have been another; leave "
            "it out, or start with lr_scheduler_type: constant"
        )
    if ours.total_episodes < kept.total_episodes:
        raise UserError(
            f"total_episodes can only grow: {where} was started with {kept.total_episodes}; leave "
            "it out, or give more"
        )
