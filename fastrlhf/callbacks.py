"""What others run at a training's events: transformers' callbacks, as its Trainer calls them.

Events: on_train_begin, on_step_begin, on_step_end, on_log (logs), on_evaluate (metrics), on_save,
on_train_end. A step is one rollout with its updates. The trainer obeys what a callback sets in
`control` in on_step_end: should_evaluate, should_save, should_training_stop. Deviation: `args` is
our config, and `state.log_history` stays empty (metrics.jsonl is that).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

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

    def __call__(self, event: str, **given: Any) -> None:
        """Call ``event`` on every callback; one that returns a control replaces it."""
        for callback in self.callbacks:
            call = getattr(callback, event)
            answer = call(self.config, self.state, self.control, **self.given, **given)
            if isinstance(answer, TrainerControl):
                self.control = answer
