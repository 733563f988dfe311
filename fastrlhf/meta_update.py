"""The outer step of a meta-training: from adaptations to a changed initialisation.

With theta the initialisation, phi_i the weights after adapting to task i, and B tasks a meta step:

    reptile   theta <- theta - rate · mean_i (theta - phi_i)                  plain gradient descent
    fomaml    theta <- AdamW(theta, mean_i grad L_i(phi_i), rate)             no second derivatives

Sources: Nichol et al. 2018, algorithm 2 (reptile); Finn et al. 2017, section 5.2 (first order).
The gradient of fomaml is that of the task's own loss on a rollout of the adapted policy, clipped as
any other gradient. With LoRA, theta are the two factors of each adapter, and a mean of factors is
not the factor of a mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SelfCheckError
from .meta_config import MetaConfig
from .optim import make_optimizer
from .skipped_steps import SkippedSteps
from .step import NonFiniteStep

__all__ = ["GradientRecorder", "OuterStep", "SkippedTasks", "copies", "restore"]


def copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The numbers of ``parameters`` as they are now."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def restore(parameters: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
    """Give ``parameters`` the numbers that `copies` kept."""
    for parameter, numbers in zip(parameters, kept, strict=True):
        parameter.copy_(numbers)


class GradientRecorder(torch.optim.Optimizer):
    """Takes the place of an optimizer: adds gradients up and changes no weight."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(parameters, {"lr": 0.0})
        self.sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter in self.sums:
                    self.sums[parameter] += parameter.grad
                else:
                    self.sums[parameter] = parameter.grad.detach().clone()

    def mean(self, parameters: Iterable[nn.Parameter], steps: int) -> list[Tensor]:
        """What was added up in ``steps`` steps, over their number; 0 without a gradient."""
        return [self.sums[p] / steps if p in self.sums else torch.zeros_like(p) for p in parameters]


class OuterStep:
    """Changes the initialisation.

    Args:
        parameters: the weights that are adapted.
        config: method, meta_learning_rate, its schedule and `optim` are read.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: MetaConfig):
        self.parameters = parameters
        self.optimizer: torch.optim.Optimizer
        if config.method == "reptile":
            self.optimizer = torch.optim.SGD(parameters, lr=config.outer_rate)
        else:
            self.optimizer = make_optimizer(
                parameters, replace(config, learning_rate=config.outer_rate)
            )

        def factor(step: int) -> float:
            linear = config.meta_lr_scheduler_type == "linear"
            return max(0.0, 1 - step / config.meta_steps) if linear else 1.0

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def __call__(self, directions: Sequence[Sequence[Tensor]]) -> float:
        """Step against the mean of the tasks' ``directions``; the norm of that mean."""
        for place, parameter in enumerate(self.parameters):
            total = torch.zeros_like(parameter)
            for direction in directions:
                total += direction[place]
            parameter.grad = total / len(directions)
        norms = [
            torch.linalg.vector_norm(p.grad.float()) for p in self.parameters if p.grad is not None
        ]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return float(torch.linalg.vector_norm(torch.stack(norms)))


class SkippedTasks(SkippedSteps):
    """Counts adaptations that broke off: a loss, gradient or weight was NaN or infinite.

    The initialisation learns nothing from such a task in that meta step. `max_skipped_steps` of
    them in a row are no accident, and the run stops.
    """

    broken: str | None = None

    def begin(self) -> None:
        """An adaptation begins."""
        self.broken = None

    def skip(self, broken: NonFiniteStep | str) -> None:
        """The adaptation that is under way cannot go on."""
        self.broken = self.broken or str(broken)

    def taken(self) -> None:
        """An optimizer step of it was taken."""

    def ended(self, task: str) -> bool:
        """The adaptation to ``task`` is over; whether it can be learnt from.

        Raises:
            SelfCheckError: too many in a row cannot.
        """
        if self.broken is None:
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        why = f"{self.broken}{self.scores}"
        if self.in_a_row < self.most:
            self.say(f"task {task!r} is left out of this meta step: {why}")
            return False
        raise SelfCheckError(
            f"{self.in_a_row} adaptations in a row broke off, the last of them to task {task!r}, "
            f"and the run stops: {why}; lower learning_rate or meta_learning_rate, bound the "
            f"rewards, or train without bf16{self.last_checkpoint()}"
        )

    def metrics(self) -> dict[str, int]:
        """How many tasks were skipped in this run so far."""
        return {"check/skipped_tasks": self.total}
