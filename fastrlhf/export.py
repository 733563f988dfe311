"""A run's trained policy as one plain model: what transformers, vLLM and llama.cpp load.

An adapter is merged into the base's weights, W + (alpha / rank)·B·A, in float32 and rounded once to
the base's dtype. A base that the run held in 8 or 4 bits is loaded unquantised: the adapter was
trained beside the rounded weights, so the merged model is not bit for bit the one that trained, and
that is said. The folder appears only when all of it is written.
"""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open

from .checkpoint import ADAPTER, OWN, in_place
from .config import PPOConfig
from .errors import UserError
from .kept_settings import run_config
from .multi_agent.config import MultiAgentConfig
from .pretrained import find_pretrained
from .run_checkpoints import numbered
from .run_files import read_given
from .run_state import MANIFEST, read_whole

__all__ = ["export_run"]


def export_run(run: Path, output: Path, checkpoint: str | None = None) -> Path:
    """Write the policy of ``run`` to the new folder ``output``, with its tokenizer.

    Args:
        checkpoint: the name of one in the run's folder. None: `final`, else the newest. Of a run
            of agents it names one of them too: `final/speaker`.

    Raises:
        UserError: no run, no such checkpoint, a model that has no name, or a folder that is there.
    """
    config = with_given_model(run, run_config(run))
    if (output.is_dir() and any(output.iterdir())) or output.is_file():
        raise UserError(f"{output} is there already; give another --output")
    above = next(path for path in output.absolute().parents if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{above} is not a folder that you may write to; give another --output")
    folder = chosen(run / "checkpoints", checkpoint, isinstance(config, MultiAgentConfig))
    if (folder / MANIFEST).exists():
        read_whole(folder)
    found = find_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    if config.quantization:
        warnings.warn(
            f"the run trained on {config.quantization} weights; the adapter is merged "
            "into the unquantised ones, which answer a little differently",
            stacklevel=2,
        )
    with in_place(output) as made:
        if (folder / "config.json").exists() and not (folder / OWN).exists():
            for path in folder.iterdir():
                if path.is_file() and path.name not in NOT_THE_MODEL:
                    shutil.copy(path, made)
        else:
            model: Any = found.load(dtype=dtype)
            if (folder / OWN).exists():
                fill(model, folder / OWN)
            elif (folder / ADAPTER).exists():
                model = merged(model, folder)
            else:
                raise UserError(f"{folder} holds no weights of a policy; give another --checkpoint")
            model.save_pretrained(made)
        found.tokenizer.save_pretrained(made)
    return output


NOT_THE_MODEL = (
    MANIFEST, "state.json", "optimizer.safetensors", "config.yaml", "value_head.safetensors",
    "reward_head.safetensors", "mode_policy.safetensors",
)  # fmt: skip


def with_given_model(run: Path, config: PPOConfig) -> PPOConfig:
    """The settings with the model that the run trained, where that came from Python.

    Raises:
        UserError: a model that has no name to load it by.
    """
    model = read_given(run).get("model")
    if model is True:
        raise UserError(
            f"the run in {run} trained a model given from Python, so that its folder cannot name "
            "what the adapter is merged into; load that model and then the adapter with peft"
        )
    return replace(config, model=model) if isinstance(model, str) else config


def chosen(checkpoints: Path, name: str | None, of_agents: bool) -> Path:
    there = [p.name for p in numbered(checkpoints)]
    others = [n for n in ("final", "best", "interrupted") if (checkpoints / n).is_dir()]
    if name is None:
        name = "final" if "final" in others else next(iter(there), None)
    names = [*others, *there]
    # In a run of agents each has a folder of its own; the policy beside them has learnt nothing.
    found = [(n, p.parent.name) for n in names for p in checkpoints.glob(f"{n}/*/{ADAPTER}")]
    agents = [f"{n}/{agent}" for n, agent in found] if of_agents else []
    if name in names and (own := sorted(a for a in agents if a.startswith(f"{name}/"))):
        raise UserError(f"{checkpoints / name} holds agents; give --checkpoint {' or '.join(own)}")
    if name is None or name not in (*names, *agents):
        have = ", ".join(names) or "none"
        raise UserError(f"{checkpoints} has no {name or 'checkpoint'}; it has: {have}")
    return checkpoints / name


@torch.no_grad()
def fill(model: torch.nn.Module, file: Path) -> None:
    named = dict(model.named_parameters())
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            if name not in named:
                raise UserError(f"{file} is of another model: this one has no {name}")
            named[name].copy_(opened.get_tensor(name))


@torch.no_grad()
def merged(model: Any, folder: Path) -> Any:
    """The model with its adapter in the weights themselves."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    # Rounded once, at the end: the product of an adapter in bfloat16 would be rounded twice.
    plain = PeftModel.from_pretrained(model.float(), str(folder)).merge_and_unload()
    for name, p in plain.named_parameters():
        p.data = p.data.to(dtypes[name])
    plain.config.dtype = next(iter(dtypes.values()))
    return plain
