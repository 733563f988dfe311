"""All that changes in a run but for its weights: what the next step depends on, in plain files.

`optimizer.safetensors` has the optimizer's tensors. `state.json` has the rest: the step, which is
the data's cursor too (the order of the prompts is drawn from the seed), the random generators of
every device, the schedule, and whatever else carries something from one step to the next: any
object whose `state_dict()` JSON can hold. `manifest.json` has the SHA-256 of every file beside it.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .backbone import SharedBackbone
from .checkpoint import check_finite, load_weights, write_weights
from .errors import UserError
from .optimizer_state import load_optimizer_state, optimizer_numbers, optimizer_tensors
from .pretrained import sha256

__all__ = ["Damaged", "RunState", "Stateful", "read_whole"]

STATE, TENSORS, MANIFEST, CONFIG = (
    "state.json", "optimizer.safetensors", "manifest.json", "config.yaml",
)  # fmt: skip
FORMAT = 1


class Damaged(UserError):
    """A checkpoint that is not whole; the message names the file."""


@runtime_checkable
class Stateful(Protocol):
    """What carries something from one step to the next, and can give it as JSON."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> object: ...


@dataclass
class RunState:
    """What a run's next step depends on.

    generators: those that draw, by name. others: whatever else changes, by name.
    """

    backbone: SharedBackbone
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generators: Mapping[str, torch.Generator]
    others: dict[str, Stateful] = field(default_factory=dict)

    def moment(self) -> dict[str, Any]:
        """All of it but for tensors, as JSON; what changes later changes nothing in it.

        Raises:
            UserError: one of `others` gives what JSON cannot hold.
        """
        others = {name: one.state_dict() for name, one in self.others.items()}
        return {
            "optimizer": optimizer_numbers(self.optimizer),
            "schedule": plain("the schedule", self.schedule.state_dict()),
            "random": random_state(self.generators),
            "others": {name: plain(name, held) for name, held in others.items()},
        }

    def write(self, folder: Path, state: Mapping[str, Any], config: str) -> None:
        """Write a whole checkpoint to the folder that is there.

        Args:
            state: of `moment`, and what else is to be known, as JSON.
            config: the run's configuration as YAML.

        Raises:
            SelfCheckError: weights or optimizer state that are NaN or infinite.
        """
        tensors = optimizer_tensors(self.optimizer)
        check_finite(self.backbone, tensors.values())
        write_weights(self.backbone, folder)
        save_file(tensors, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        (folder / CONFIG).write_text(config, encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
        manifest = {"format": FORMAT, "sha256": digests}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint whose state `read_whole` gave."""
        load_weights(self.backbone, folder)
        load_optimizer_state(self.optimizer, load_file(folder / TENSORS), state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name, held in state["others"].items():
            if name in self.others:
                self.others[name].load_state_dict(held)
        load_random_state(self.generators, state["random"])


def read_whole(folder: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's state and its configuration's text.

    Raises:
        Damaged: a file is missing, or is not as it was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, digests = manifest["format"], manifest["sha256"]
        if version != FORMAT:
            raise UserError(
                f"checkpoint {folder} has format {version}, and this version reads {FORMAT}; "
                "resume with the version of fastrlhf that wrote it"
            )
        for name in {STATE, TENSORS, CONFIG, *digests}:
            if digests[name] != sha256(folder / name):
                raise Damaged(f"checkpoint {folder} is damaged: {name} is not as it was written")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return state, (folder / CONFIG).read_text(encoding="utf-8")
    except OSError as error:
        reason = f"{Path(error.filename or folder).name}: {error.strerror}"
        raise Damaged(f"checkpoint {folder} is damaged ({reason})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise Damaged(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read") from error


def plain(name: str, held: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(held))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the state_dict of {name} cannot be saved as JSON ({error}); return numbers, texts, "
            "lists and dicts of them"
        ) from error


def random_state(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Every generator that may draw: the run's own, torch's on each device, Python's, NumPy's."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "own": {name: as_text(g.get_state()) for name, g in generators.items()},
        "torch": as_text(torch.get_rng_state()),
        "cuda": [as_text(state) for state in torch.cuda.get_rng_state_all()],
        "python": random.getstate(),
        "numpy": numpy_state,
    }


def load_random_state(generators: Mapping[str, torch.Generator], state: Mapping[str, Any]) -> None:
    for name, generator in generators.items():
        generator.set_state(as_bytes(state["own"][name]))
    torch.set_rng_state(as_bytes(state["torch"]))
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([as_bytes(text) for text in state["cuda"]])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])


def as_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
