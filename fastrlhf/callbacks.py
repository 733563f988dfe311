"""What others run at a training's events: transformers' callbacks, as its Trainer calls them.

Events: on_train_begin, on_step_begin, on_step_end, on_log (logs), on_evaluate (metrics), on_save,
on_train_end. A step is one rollout with its updates. The trainer obeys what a callback sets in
`control` in on_step_end: should_evaluate, should_save, should_training_stop. Deviation: `args` is
our config, and `state.log_history` stays empty (metrics.jsonl is that).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from .config import PPOConfig
from .errors import UserError

__all__ = ["Callbacks"]


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
        self.callbacks = [c() if isinstance(c, type) else c for c in callbacks]
        for callback in self.callbacks:
            if not isinstance(callback, TrainerCallback):
                raise UserError(
                    f"callbacks: {type(callback).__name__} is no transformers.TrainerCallback; "
                    "derive it from that class"
                )
        self.config = config
        self.given = given
        self.state = TrainerState(
            max_steps=config.steps, eval_steps=config.eval_steps or config.steps
        )
        self.control = TrainerControl()

    def step_begin(self, number: int) -> None:
        """Step ``number`` begins: what was asked for in the last is done."""
        self.state.global_step = number
        self.control.should_save = self.control.should_evaluate = False
        self("on_step_begin")

    def state_dict(self) -> dict[str, Any]:
        """`state`, and what callbacks keep: by `state_dict`, or by transformers' `state`."""
        kept = {
            f.name: getattr(self.state, f.name)
            for f in fields(self.state)
            if f.name not in ("log_history", "stateful_callbacks", "max_steps", "eval_steps")
        }
        own: dict[str, Any] = {}
        for name, callback in self.named():
            if isinstance(callback, ExportableState):
                own[name] = callback.state()["attributes"]
            elif hasattr(callback, "state_dict"):
                own[name] = callback.state_dict()
        return {"state": kept, "callbacks": own}

    def load_state_dict(self, held: Mapping[str, Any]) -> None:
        """Give the state back to the callbacks that are there again."""
        for name, value in held["state"].items():
            setattr(self.state, name, value)
        for name, callback in self.named():
            if name not in held["callbacks"]:
                continue
            if isinstance(callback, ExportableState):
                for attribute, value in held["callbacks"][name].items():
                    setattr(callback, attribute, value)
            elif hasattr(callback, "load_state_dict"):
                callback.load_state_dict(held["callbacks"][name])

    def named(self) -> list[tuple[str, Any]]:
        return [(f"{type(c).__name__}-{i}", c) for i, c in enumerate(self.callbacks)]

    def __call__(self, event: str, **given: Any) -> None:
        """Call ``event`` on every callback; one that returns a control replaces it."""
        for callback in self.callbacks:
            call = getattr(callback, event)
            answer = call(self.config, self.state, self.control, **self.given, **given)
            if isinstance(answer, TrainerControl):
                self.control = answer
