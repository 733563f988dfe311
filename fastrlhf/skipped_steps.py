"""Optimizer steps that were not taken because a loss or gradient was NaN or infinite.

A single such step is passed over: weights, optimizer state and schedule are as if it had not been
tried, so the schedule ends that much higher. Several in a row are no accident, and the run stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .config import PPOConfig
from .errors import SelfCheckError
from .step import NonFiniteStep

__all__ = ["SkippedSteps"]


class SkippedSteps:
    """Counts them.

    Args:
        config: `max_skipped_steps` in a row are too many.
        say: told of each.
        last_checkpoint: what the run can be resumed from, as a clause.
    """

    def __init__(
        self,
        config: PPOConfig,
        say: Callable[[str], None] = lambda text: None,
        last_checkpoint: Callable[[], str] = lambda: "",
    ):
        self.most = config.max_skipped_steps
        self.say = say
        self.last_checkpoint = last_checkpoint
        self.total = 0
        self.in_a_row = 0
        self.scores = ""

    def judged(self, scores: Tensor) -> None:
        """The rollout that is learnt from has these scores, [B], NaN where not judged."""
        known = scores[~scores.isnan()]
        if len(known):
            self.scores = f"; this rollout's scores go from {known.min():.4g} to {known.max():.4g}"

    def skip(self, broken: NonFiniteStep) -> None:
        """A step was not taken.

        Raises:
            SelfCheckError: too many in a row.
        """
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row < self.most:
            self.say(f"an optimizer step was skipped: {broken}{self.scores}")
            return
        several = f"{self.in_a_row} optimizer steps in a row were"
        count = several if self.in_a_row > 1 else "an optimizer step was"
        raise SelfCheckError(
            f"{count} not taken, and the run stops: {broken}{self.scores}; lower learning_rate, "
            f"bound the reward, or train without bf16{self.last_checkpoint()}"
        ) from broken

    def taken(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def metrics(self) -> dict[str, int]:
        """How many steps were skipped in this run so far."""
        return {"check/skipped_steps": self.total}

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
