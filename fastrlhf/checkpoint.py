"""Trained weights on disk: adapters in PEFT's format, all else in safetensors.

| what trains | what is written |
|---|---|
| adapters | the policy's in the folder itself, every other role's in a folder of its name |
| the top layers | `trained_layers.safetensors`, under the model's own names |
| everything | the whole model, as transformers writes it |
| heads | `value_head.safetensors`, `reward_head.safetensors`, and those of `further_heads` |

A folder appears under its name only when all of it is written, so an interrupted save never leaves
half of one. Nothing is pickled. Weights that are NaN or infinite are not written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbone import SharedBackbone
from .errors import SelfCheckError
from .pretrained import replace_folder

__all__ = [
    "check_finite",
    "in_place",
    "load_weights",
    "save_weights",
    "weight_bytes",
    "write_weights",
]

OWN = "trained_layers.safetensors"
ADAPTER = "adapter_model.safetensors"


@contextmanager
def in_place(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` when the block has ended well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        yield made
        replace_folder(made, folder)


def save_weights(backbone: SharedBackbone, folder: Path) -> Path:
    """Write what is the roles' own to ``folder``; returns it.

    Raises:
        SelfCheckError: weights that are NaN or infinite.
    """
    check_finite(backbone)
    with in_place(folder) as made:
        write_weights(backbone, made)
    return folder


def write_weights(backbone: SharedBackbone, folder: Path) -> None:
    """Write what is the roles' own into the folder that is there."""
    save_own_layers(backbone, folder)
    # PEFT reads the weights off the model that it adapted: in full training, the originals.
    with backbone.base.placed(originals=True):
        backbone.adapters.save(folder, adapter_names(backbone))
    for name, head in heads(backbone):
        save_file(head.state_dict(), folder / f"{name}.safetensors")


@torch.no_grad()
def load_weights(backbone: SharedBackbone, folder: Path) -> None:
    """Give ``backbone`` the weights that `write_weights` wrote for one like it, bit for bit."""
    own = own_layers(backbone)
    if own:
        only = folder / OWN
        files = [only] if only.exists() else sorted(folder.glob("*.safetensors"))
        left = dict(own)
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in left.keys() & set(opened.keys()):
                    left.pop(name).copy_(opened.get_tensor(name))
        if left:
            raise SelfCheckError(f"{folder} lacks {next(iter(left))}")
    with backbone.base.placed(originals=True):
        for name in adapter_names(backbone):
            where = folder if name == "default" else folder / name
            if other := backbone.adapters.fill(name, load_file(where / ADAPTER)):
                raise SelfCheckError(f"{where} and the run's adapter differ in {other[0]}")
    for name, head in heads(backbone):
        head.load_state_dict(load_file(folder / f"{name}.safetensors"))


def adapter_names(backbone: SharedBackbone) -> list[str]:
    return [name for adapters in backbone.roles.values() for name in adapters]


def heads(backbone: SharedBackbone) -> list[tuple[str, nn.Module]]:
    named = (("value_head", backbone.value_head), ("reward_head", backbone.reward_head))
    own = [(name, head) for name, head in named if head is not None]
    return [*own, *backbone.further_heads.items()]


def own_layers(backbone: SharedBackbone) -> dict[str, Tensor]:
    """What full training trains, under the model's names; nothing where adapters train."""
    own = {id(p) for p in backbone.base.own()}
    with backbone.base.placed(originals=False):
        named = backbone.model.named_parameters()
        return {name: p.detach() for name, p in named if id(p) in own}


def save_own_layers(backbone: SharedBackbone, folder: Path) -> None:
    """Write what full training trained, if that is how the policy is trained."""
    own = own_layers(backbone)
    if backbone.entire:
        backbone.model.save_pretrained(folder)
        if backbone.tokenizer is not None:
            backbone.tokenizer.save_pretrained(folder)
        written: set[str] = set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                written |= set(opened.keys())
        # Some families' weights have other names, or other shapes, on disk than in memory.
        if own.keys() <= written:
            return
    if own:
        save_file({name: x.contiguous() for name, x in own.items()}, folder / OWN)


def check_finite(backbone: SharedBackbone, others: Iterable[Tensor] = ()) -> None:
    """Raise SelfCheckError if a trained weight, or one of ``others``, is NaN or infinite."""
    named = [(n, p) for n, p in backbone.named_parameters() if p.requires_grad]
    for name, x in [*named, *(("the optimizer's state", x) for x in others)]:
        if x.is_floating_point() and not x.isfinite().all():
            raise SelfCheckError(
                f"{name} has NaN or infinite numbers, so nothing is saved; lower learning_rate, "
                "or train without bf16"
            )


def weight_bytes(backbone: SharedBackbone) -> int:
    """How many bytes `write_weights` writes, but for some kB of texts."""
    total = sum(x.nbytes for x in own_layers(backbone).values())
    for name in adapter_names(backbone):
        total += sum(p.nbytes for p in backbone.adapters.parameters(name))
    return total + sum(p.nbytes for _, head in heads(backbone) for p in head.parameters())
