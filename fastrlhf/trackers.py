"""Where a run's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

A tracker is a callback of three methods: `open`, `write`, `close`. Each package is imported when
its tracker opens, and only where `report_to` names it. What the services keep of their own (online
or offline, project, place) is told to them by their own environment variables, WANDB_MODE=offline
among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState

if TYPE_CHECKING:
    from .metrics import RunFolder

__all__ = ["TRACKERS", "Tracker"]

PROJECT = "fastrlhf"


class Tracker(TrainerCallback):
    """Hands every figure of a run on, metrics under their own names, evaluations under `eval/`.

    Args:
        folder: the run's, as it is when the run begins; what a service writes to disk goes into it.
        name: of the run.
    """

    package: ClassVar[str]

    def __init__(self, folder: RunFolder, name: str):
        self.folder, self.name = folder, name

    def open(self, settings: dict[str, Any], step: int) -> None:
        """The run begins with ``settings``, or goes on after ``step``."""
        raise NotImplementedError

    def write(self, figures: dict[str, float], step: int) -> None:
        """Figures of ``step``."""
        raise NotImplementedError

    def close(self) -> None:
        """The run has ended."""
        raise NotImplementedError

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self.open(asdict(args), state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.write(numbers(given["logs"]), given["logs"]["step"])

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        named = {f"eval/{key}": value for key, value in given["metrics"].items()}
        self.write(numbers(named), state.global_step)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self.close()


class TensorBoard(Tracker):
    """Event files in the run's own folder: `tensorboard --logdir runs`."""

    package = "tensorboard"

    def open(self, settings: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A run that goes on writes again what it did after its checkpoint.
        again = step + 1 if step else None
        self.writer = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=again)
        lines = [f"    {key}: {value}" for key, value in settings.items()]
        self.writer.add_text("settings", "\n".join(lines), step)

    def write(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        # A run that is killed has its figures written.
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of the project `fastrlhf` (or WANDB_PROJECT); gone on with, it is the same one.

    Its id is kept in the run's folder. Figures that the service has of a step already it ignores:
    they would be the same.
    """

    package = "wandb"

    def open(self, settings: dict[str, Any], step: int) -> None:
        import os

        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        folder, kept = self.folder.path, self.folder.path / "wandb_id"
        known = kept.read_text() if step and kept.is_file() else None
        self.run = wandb.init(
            project=project, name=self.name, dir=str(folder), config=settings, id=known,
            resume="allow",
        )  # fmt: skip
        self.folder.write_text(kept.name, self.run.id)

    def write(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio(Tracker):
    """A run of the project `fastrlhf`, in trackio's own place: `trackio show`."""

    package = "trackio"

    def open(self, settings: dict[str, Any], step: int) -> None:
        import trackio

        self.service = trackio
        trackio.init(project=PROJECT, name=self.name, config=settings)

    def write(self, figures: dict[str, float], step: int) -> None:
        self.service.log(figures, step=step)

    def close(self) -> None:
        self.service.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """What a curve can be drawn of: finite numbers, without what counts the steps."""
    return {
        key: value
        for key, value in figures.items()
        if isinstance(value, int | float) and key != "step" and math.isfinite(value)
    }
