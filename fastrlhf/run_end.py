"""Why a run ends before its last rollout: decided once, and kept in its checkpoints.

The KL limit, a callback and the hacking monitor may end a run. What is left is its last evaluation;
a run that is resumed from there does that and no rollout more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .config import PPOConfig

__all__ = ["RunEnd"]


class RunEnd:
    """Whether a run has ended.

    Args:
        config: `kl_limit` is read.
        say: told why, when it ends.

    `reason` is None while it goes on.
    """

    def __init__(self, config: PPOConfig, say: Callable[[str], object]):
        self.config = config
        self.say = say
        self.reason: str | None = None

    def decide(self, line: Mapping[str, Any], *, callback: bool, monitor: bool) -> bool:
        """Whether the run ends after the rollout with these metrics.

        Args:
            callback: whether one has set `should_training_stop`.
            monitor: whether the hacking monitor stops the run.
        """
        limit = self.config.kl_limit
        if limit is not None and line["objective/kl"] > limit:
            self.reason = f"the KL exceeds kl_limit ({limit})"
            self.say(f"stopped: {self.reason}")
        elif callback:
            self.reason = "a callback asked for it"
        elif monitor:
            self.reason = "hacking is stop"
        return self.reason is not None

    def state_dict(self) -> dict[str, Any]:
        return {"reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stay ended where the run had."""
        self.reason = state["reason"]
        if self.reason is not None:
            self.say(f"this run has ended ({self.reason}): only its last evaluation is left")
