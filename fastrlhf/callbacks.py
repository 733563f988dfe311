"""What others run at a training's events: transformers' callbacks, as its Trainer calls them.

Events: on_train_begin, on_step_begin, on_step_end, on_log (logs), on_evaluate (metrics), on_save,
on_train_end. A step is one rollout with its updates; `state.global_step` counts those that are
done. The trainer obeys what a callback sets in `control` in on_step_end (should_evaluate,
should_save, should_training_stop) and in on_evaluate (the last two). The figures of an evaluation
have our names and, behind `eval_`, those that transformers' callbacks look for. Deviation: `args`
is our config, and `state.log_history` stays empty (metrics.jsonl is that).

transformers' callbacks bring PEFT and bitsandbytes with them, 55 MB: they are imported where there
are callbacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .config import PPOConfig
from .errors import UserError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from .metrics import RunFolder

__all__ = ["Callbacks", "make_trackers"]


@dataclass
class State:
    """Of transformers' `TrainerState` what a run without callbacks keeps."""

    max_steps: int
    eval_steps: int
    global_step: int = 0
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None


@dataclass
class Control:
    """Of transformers' `TrainerControl` what a trainer reads: nobody asks for anything."""

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False


class Callbacks:
    """Calls every callback, in their order; a class is made an object first.

    Args:
        callbacks: `transformers.TrainerCallback` objects or classes.
        config: reaches them as `args`.
        given: keyword arguments of every call, like `model`.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        config: PPOConfig,
        **given: Any,
    ):
        self.config = config
        self.given = given
        self.callbacks = [c() if isinstance(c, type) else c for c in callbacks]
        self.state: Any = State(config.steps, config.eval_steps or config.steps)
        self.control: Any = Control()
        if self.callbacks:
            self.adopt()

    def adopt(self) -> None:
        """Keep transformers' own state and control: somebody looks at them."""
        from transformers import (
            EarlyStoppingCallback,
            TrainerCallback,
            TrainerControl,
            TrainerState,
        )

        for callback in self.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and self.config.eval_steps is None:
                raise UserError(
                    f"callbacks: {type(callback).__name__} compares evaluations along the run; "
                    "set eval_steps"
                )
            if not isinstance(callback, TrainerCallback):
                raise UserError(
                    f"callbacks: {type(callback).__name__} is no transformers.TrainerCallback; "
                    "derive it from that class"
                )
        self.state = TrainerState(**vars(self.state))
        self.control = TrainerControl(**vars(self.control))

    def step_begin(self, number: int) -> None:
        """Step ``number`` begins: what was asked for in the last is done.

        Callbacks are not told of it before it has ended; who keeps the run knows it from here on.
        """
        self.control.should_save = self.control.should_evaluate = False
        self("on_step_begin")
        self.state.global_step = number

    @property
    def asked_to_stop(self) -> bool:
        """Whether a callback has asked that training ends."""
        return bool(self.control.should_training_stop)

    def state_dict(self) -> dict[str, Any]:
        """`state`, and what callbacks keep: by `state_dict`, or by transformers' `state`."""
        kept = {
            f.name: getattr(self.state, f.name)
            for f in fields(self.state)
            if f.name not in ("log_history", "stateful_callbacks", "max_steps", "eval_steps")
        }
        own: dict[str, Any] = {}
        for name, callback in self.named():
            if is_exportable(callback):
                own[name] = callback.state()["attributes"]
            elif hasattr(callback, "state_dict"):
                own[name] = callback.state_dict()
        return {"state": kept, "callbacks": own}

    def load_state_dict(self, held: Mapping[str, Any]) -> None:
        """Give the state back to the callbacks that are there again."""
        for name, value in held["state"].items():
            setattr(self.state, name, value)
        there, met = dict(self.named()), Counter[str]()
        # Numbers only tell apart: they once counted other classes' callbacks too.
        for name, value in held["callbacks"].items():
            kind = name.rpartition("-")[0]
            callback: Any = there.get(f"{kind}-{met[kind]}")
            met[kind] += 1
            if is_exportable(callback):
                for attribute, one in value.items():
                    setattr(callback, attribute, one)
            elif hasattr(callback, "load_state_dict"):
                callback.load_state_dict(value)

    def named(self) -> list[tuple[str, Any]]:
        """Every callback by its class and its number within that: others may come and go."""
        named, met = [], Counter[str]()
        for callback in self.callbacks:
            kind = type(callback).__name__
            named.append((f"{kind}-{met[kind]}", callback))
            met[kind] += 1
        return named

    def __call__(self, event: str, **given: Any) -> None:
        """Call ``event`` on every callback; one that returns a control replaces it."""
        if not self.callbacks:
            return
        from transformers import TrainerControl

        if isinstance(self.state, State):
            # They were appended later.
            self.adopt()
        for callback in self.callbacks:
            call, told = getattr(callback, event), self.given | as_known(callback, given)
            answer = call(self.config, self.state, self.control, **told)
            if isinstance(answer, TrainerControl):
                self.control = answer


def as_known(callback: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What an event gives, an evaluation's figures under transformers' names too.

    A tracker would draw them twice.
    """
    from .trackers import Tracker

    if "metrics" not in given or isinstance(callback, Tracker):
        return given
    metrics = given["metrics"]
    return given | {"metrics": metrics | {f"eval_{name}": x for name, x in metrics.items()}}


def is_exportable(callback: Any) -> bool:
    """Whether a callback keeps a state in transformers' own way."""
    from transformers.trainer_callback import ExportableState

    return isinstance(callback, ExportableState)


def make_trackers(config: PPOConfig, folder: RunFolder, name: str) -> list[TrainerCallback]:
    """The trackers that `config.report_to` names; nothing is imported yet.

    Raises:
        UserError: a package that is not installed.
    """
    if not config.trackers:
        return []
    from .trackers import TRACKERS

    made: list[TrainerCallback] = []
    for tracker in (TRACKERS[named] for named in config.trackers):
        if find_spec(tracker.package) is None:
            raise UserError(
                f"report_to: {tracker.package} is not installed; run: pip install {tracker.package}"
            )
        made.append(tracker(folder, name))
    return made
