"""What an algorithm carries from one rollout to the next: coefficients that adapt, a baseline.

Each is a number or two with a rule, and gives them as a dict of numbers that JSON can hold.
Deviations: `KLController` and `PenaltyController` see the KL of the whole rollout, once a rollout;
the penalty's KL is that of the last minibatch, before its own step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastrlhf_kernels import LossStats

from .config import PPOConfig

__all__ = ["AlgorithmState", "KLController", "MovingAverage", "PenaltyController"]


class KLController:
    """The weight of the KL to the reference, fixed or steered to a target.

        e = clip(KL / target - 1, -0.2, 0.2);  coef <- coef · (1 + e · episodes / horizon)

    Source: Ziegler et al. 2019, section 2.2. target: nats a sequence, or None for a fixed weight.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10000.0):
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """Learn that the last ``episodes`` had a mean KL of ``kl`` nats a sequence."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon


class PenaltyController:
    """The weight of KL(old policy, policy): doubled above 1.5 targets, halved below a 1.5th of it.

    Source: Schulman et al. 2017, section 4. target: nats a token.
    """

    def __init__(self, coef: float, target: float):
        self.coef = coef
        self.target = target

    def update(self, kl: float) -> None:
        if kl > 1.5 * self.target:
            self.coef *= 2
        elif kl < self.target / 1.5:
            self.coef /= 2


class MovingAverage:
    """Exponential average of a stream: `decay` of the past and 1 - decay of what comes.

    Started at 0 and divided by the weight that it has seen, as Adam's moments are, so that the
    first number counts in full. `value` is 0 before it.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    def update(self, x: float) -> None:
        self.total = self.decay * self.total + (1 - self.decay) * x
        self.weight = self.decay * self.weight + (1 - self.decay)


@dataclass
class AlgorithmState:
    """All of it, for one run."""

    kl: KLController
    old_kl: PenaltyController
    returns: MovingAverage

    @classmethod
    def of(cls, config: PPOConfig) -> AlgorithmState:
        target = config.kl_target if config.kl_controller == "adaptive" else None
        return cls(
            KLController(config.kl_coef, target, config.kl_horizon),
            PenaltyController(config.old_kl_coef, config.old_kl_target),
            MovingAverage(config.baseline_decay),
        )

    def update(self, kl: float | None, episodes: int, last: LossStats | None) -> None:
        """Learn how a rollout of ``episodes`` went.

        kl: to the reference, nats a sequence; None without one. last: of the rollout's last
        optimizer step; None if every one was skipped.
        """
        if kl is not None:
            self.kl.update(kl, episodes)
        if last is not None:
            self.old_kl.update(float(last.approx_kl))

    def metrics(self, config: PPOConfig) -> dict[str, float]:
        """The coefficients that this rollout was trained with."""
        moves = config.kl_controller == "adaptive" or config.hacking == "raise_kl"
        shown = {"kl_coef": self.kl.coef} if moves else {}
        return shown | ({"old_kl_coef": self.old_kl.coef} if config.algorithm == "ppo_kl" else {})

    def state_dict(self) -> dict[str, float]:
        """What changes in a run; the rest is in the configuration."""
        return {
            "kl_coef": self.kl.coef,
            "old_kl_coef": self.old_kl.coef,
            "returns_total": self.returns.total,
            "returns_weight": self.returns.weight,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.kl.coef, self.old_kl.coef = state["kl_coef"], state["old_kl_coef"]
        self.returns.total, self.returns.weight = state["returns_total"], state["returns_weight"]
