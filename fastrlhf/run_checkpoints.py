"""A run's checkpoints: whether there is room for them, written when due, the oldest removed.

`step-000010` can be resumed from and holds the weights in the formats of checkpoint.py. `best`,
`final` and `interrupted` hold weights alone. All are written under another name, brought to the
disk and then renamed; whatever goes wrong in between, those before stay as they are.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .checkpoint import in_place, save_weights, weight_bytes
from .config import PPOConfig
from .configs import CONFIGS
from .errors import SelfCheckError, UserError
from .kept_settings import CHECKPOINT
from .memory_simulation import optimizer_bytes
from .metrics import RunFolder
from .run_state import RunState

__all__ = ["Checkpoints", "checkpoint_bytes", "numbered", "resume_command", "tidy"]

MIB = 2**20
TEXTS = 16 * MIB  # the tokenizer of the largest vocabularies, states of random generators


class Checkpoints:
    """Those of one run.

    Args:
        folder: of the run.
        run: what changes in it.
        facts: what is to be known of a checkpoint beside its state, as JSON.
        say: told what could not be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        run: RunState,
        config: PPOConfig,
        facts: Callable[[], Mapping[str, Any]] = dict,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.folder = folder
        self.run = run
        self.config = config
        self.facts = facts
        self.say = say

    @property
    def path(self) -> Path:
        return self.folder.path / "checkpoints"

    @property
    def last(self) -> Path | None:
        """The newest that can be resumed from."""
        return next(iter(numbered(self.path)), None)

    def told(self) -> str:
        """The newest, as a clause that ends a sentence."""
        if self.last is None:
            return "; there is no checkpoint yet"
        again = resume_command(self.config, self.folder.path, self.folder.given)
        return f"; the last good checkpoint is {self.last} (go on from it: {again})"

    def check_room(self) -> None:
        """Raise UserError where the checkpoints to come do not fit or may not be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); give another output_dir"
            ) from error
        there = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())
        needed, free = checkpoint_bytes(self.run, self.config), shutil.disk_usage(self.path).free
        if free < needed - there:
            raise UserError(
                f"the checkpoints of this run take {needed / MIB:.0f} MiB, and {self.path} has "
                f"{free / MIB:.0f} MiB free; lower save_total_limit, set save_steps to null, or "
                "give an output_dir on another disk"
            )

    def moment(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` rollouts holds beside tensors."""
        files = self.folder.positions()
        return {"step": step, **self.facts(), "files": files, **self.run.moment()}

    def save(self, step: int, moment: Mapping[str, Any] | None = None) -> Path | None:
        """Write the checkpoint after ``step`` rollouts; None if the disk did not take it.

        Args:
            moment: the state then, where something but the weights has changed since.

        Raises:
            SelfCheckError: weights or optimizer state that are NaN or infinite.
        """
        folder = self.path / f"step-{step:06d}"
        try:
            state = self.moment(step) if moment is None else moment
            with in_place(folder) as made:
                self.run.write(made, state, self.config.to_yaml())
            self.prune(folder)
        except (OSError, SafetensorError) as error:
            self.say(
                f"warning: checkpoint {folder.name} could not be written ({reason(error)}) and the "
                f"run goes on; make room on the disk of {self.path}{self.told()}"
            )
            return None
        except SelfCheckError as error:
            raise SelfCheckError(f"after step {step} {error}{self.told()}") from error
        return folder

    def prune(self, newest: Path) -> None:
        """Remove the oldest beyond save_total_limit."""
        limit = self.config.save_total_limit
        older = [folder for folder in numbered(self.path) if folder != newest]
        for folder in older[limit - 1 :] if limit is not None else []:
            remove(folder)

    def save_best(self, score: float, step: int) -> None:
        """Keep the weights as they are now as `best`."""
        try:
            save_weights(self.run.backbone, self.path / "best")
        except (OSError, SafetensorError) as error:
            self.say(
                f"warning: the best weights so far (score {score:.4g}, step {step}) could not be "
                f"written ({reason(error)}); make room on the disk of {self.path}"
            )

    def save_final(self) -> None:
        """Write the weights that training ended with.

        Raises:
            UserError: the disk did not take them.
        """
        try:
            save_weights(self.run.backbone, self.path / "final")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the trained weights could not be written ({reason(error)}); make room on the "
                f"disk of {self.path}{self.told()}"
            ) from error
        except SelfCheckError as error:
            raise SelfCheckError(f"after training {error}{self.told()}") from error
        if (self.path / "interrupted").exists():
            remove(self.path / "interrupted")

    def save_interrupted(self) -> None:
        """Write the weights as an error left them; says so where that cannot be."""
        try:
            save_weights(self.run.backbone, self.path / "interrupted")
        except (OSError, SafetensorError, SelfCheckError) as error:
            self.say(f"warning: the interrupted weights are not saved ({reason(error)})")


def numbered(path: Path) -> list[Path]:
    """The checkpoints in ``path`` that can be resumed from, the newest first."""
    found = [p for p in path.iterdir() if CHECKPOINT.fullmatch(p.name)] if path.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    match = CHECKPOINT.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def remove(folder: Path) -> None:
    """Remove a folder: under its name it is whole until it is gone."""
    doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".removed-"))
    folder.rename(doomed / "it")
    shutil.rmtree(doomed)


def tidy(path: Path) -> None:
    """Clear away what a killed process left half-done in the checkpoints' folder."""
    for hidden in path.glob(".*-*") if path.is_dir() else []:
        name, old, _ = hidden.name[1:].rpartition("-old-")
        # It was moved aside for one that had not taken its place yet.
        if old and not (path / name).exists():
            with suppress(OSError):
                (hidden / name).rename(path / name)
        shutil.rmtree(hidden)


def checkpoint_bytes(run: RunState, config: PPOConfig) -> int:
    """The most bytes that a run's checkpoints take at a time, the one being written among them."""
    parameters = run.backbone.trainable()
    weights = weight_bytes(run.backbone)
    tables = 4096 * len(parameters) if "adamw_bnb" in config.optim or "paged" in config.optim else 0
    whole = weights + optimizer_bytes(parameters, config.optim, "cpu") + tables + TEXTS
    most = config.steps // config.save_steps if config.save_steps else 0
    if config.save_total_limit is not None:
        most = min(most, config.save_total_limit + 1)
    return most * whole + weights + (2 * weights if config.save_best else 0)


def resume_command(config: PPOConfig, path: Path, given: Mapping[str, Any]) -> str:
    """What goes on with a run, on the command line; in Python where no verb trains so.

    ``given``: from Python in place of settings, which the command line would not know.
    """
    verb = next((verb for verb, kind in CONFIGS.items() if kind is type(config)), None)
    if verb is None or any(value is not None for value in given.values()):
        return f"train(resume_from_checkpoint={str(path)!r})"
    return f"fastrlhf {verb} --resume {path}"


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:160]
