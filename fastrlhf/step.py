"""One optimizer step: from the losses of a minibatch's microbatches to changed weights.

Ordinarily the gradients of all microbatches are summed, clipped and stepped at the end. With
`optimizer_in_backward` each weight is stepped as its gradient arrives, and the gradient is freed at
once, so that only one is there at a time. Its price:

1. A gradient must be whole when it arrives: a minibatch is one microbatch.
2. The norm of all gradients is known only when the last has come. To clip by it the loss is made
   and differentiated twice: for the norm, then for the step. Clipping each parameter by its own
   norm (`grad_clip: per_parameter`) takes one pass, and bounds something else.
3. A step that breaks off half-way has changed some weights; it cannot be taken again.

In all other cases an `Updater` that raises has changed no weight and left no gradient. Norms are of
float32 numbers, whatever the gradient's dtype.

A loss or gradient that is NaN or infinite is no step: weights, optimizer state and schedule stay as
they are, and `NonFiniteStep` says what was found. `skipped_steps.py` counts these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from .config import PPOConfig
from .errors import SelfCheckError, UserError
from .host_memory import return_freed_memory

__all__ = ["NonFiniteStep", "Updater", "gradient_norm"]

# Elements of a CPU tensor whose squares are summed in one go: float32 sums of more lose digits, and
# torch raises all of a 16-bit tensor to float32 before it sums.
PIECE = 2**18


class NonFiniteStep(SelfCheckError):
    """A step was not taken, because its loss or a gradient is NaN or infinite.

    Nothing has changed: the next step may be tried.
    """


class Part(Protocol):
    """A microbatch's share of the minibatch's loss, as `losses.MicrobatchLoss` is one."""

    @property
    def loss(self) -> Tensor: ...

    def detached(self) -> Self: ...


P = TypeVar("P", bound=Part)


def gradient_norm(gradient: Tensor) -> Tensor:
    """`gradient.float().norm()`, without a float32 copy of it."""
    if gradient.device.type != "cpu" or gradient.numel() <= PIECE:
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    pieces = gradient.reshape(-1).split(PIECE)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms))


class Updater:
    """Takes optimizer steps in the way that ``config`` says.

    Args:
        optimizer: steps every parameter of its groups that has a gradient.
        schedule: of its learning rate; steps once for each `update`.
        config: max_grad_norm, grad_clip and optimizer_in_backward are read.
        names: of the parameters, to say which gradient was broken.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        config: PPOConfig,
        names: Mapping[nn.Parameter, str] | None = None,
    ):
        self.names = names or {}
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_norm = config.max_grad_norm
        self.in_backward = config.optimizer_in_backward
        self.clips_each = config.grad_clip == "per_parameter"

    @property
    def can_repeat(self) -> bool:
        """Whether an `update` that raised can be called again, as if it had never been."""
        return not self.in_backward

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def update(
        self,
        losses: Iterable[Callable[[], P]],
        check: Callable[[list[P]], object] = lambda parts: None,
    ) -> tuple[list[P], Tensor]:
        """One step down the sum of ``losses``.

        Args:
            losses: each makes a share of the loss anew, with a graph of its own, and is asked for
                when the one before has been differentiated; with optimizer_in_backward there is
                one, and to clip by the norm of all gradients it is called twice.
            check: is given the losses, detached, before any weight changes, and may raise.

        Returns:
            The same losses, and the norm of all gradients before clipping, [] float32.

        Raises:
            UserError: several microbatches with optimizer_in_backward.
            NonFiniteStep: a loss or a gradient that is not finite; nothing has changed.
            SelfCheckError: likewise, where weights are stepped before it is known.
        """
        with self.no_gradients_left():
            if not self.in_backward:
                parts, norm = self.step_at_the_end(losses, check)
            else:
                step = self.step_on_arrival if self.clips_each else self.step_in_second_pass
                parts, norm = step(only(losses), check)
        self.schedule.step()
        return parts, norm

    def step_at_the_end(self, losses, check) -> tuple[list[Any], Tensor]:
        parts = []
        for make in losses:
            part = make()
            part.loss.backward()
            parts.append(part.detached())
            # The next graph is not made while this one is held, nor what it is made of.
            del part, make
        refuse_broken(parts)
        check(parts)
        gradients = {p: p.grad for p in self.parameters if p.grad is not None}
        norms = {p: gradient_norm(gradient) for p, gradient in gradients.items()}
        norm = self.finite_total(norms)
        for p, gradient in gradients.items():
            gradient.mul_(self.factor(norms[p] if self.clips_each else norm))
        self.optimizer.step()
        return parts, norm

    def step_on_arrival(self, make, check) -> tuple[list[Any], Tensor]:
        """One pass, each gradient clipped by its own norm."""
        norms: dict[nn.Parameter, Tensor] = {}

        def step(parameter: nn.Parameter, gradient: Tensor) -> None:
            norms[parameter] = norm = gradient_norm(gradient)
            # A wait for the device, once a parameter: the step must not be taken if this fails.
            if not norm.isfinite():
                broken = self.broken(parameter, norm)
                if len(norms) == 1:
                    raise NonFiniteStep(broken)
                raise SelfCheckError(
                    f"{broken}, and weights that come earlier in the backward are stepped already, "
                    "so this step cannot be skipped; set grad_clip to norm, or "
                    "optimizer_in_backward to false"
                )
            self.step_one(gradient, self.factor(norm))

        return_freed_memory()
        part = make()
        refuse_broken([part.detached()])
        check([part.detached()])
        with self.arriving(step):
            return_freed_memory()
            part.loss.backward()
        return [part.detached()], self.total(norms)

    def step_in_second_pass(self, make, check) -> tuple[list[Any], Tensor]:
        """The first pass finds the norm of all gradients, the second steps."""
        norms: dict[nn.Parameter, Tensor] = {}

        def measure(parameter: nn.Parameter, gradient: Tensor) -> None:
            norms[parameter] = gradient_norm(gradient)

        return_freed_memory()
        part = make()
        refuse_broken([part.detached()])
        check([part.detached()])
        with self.arriving(measure):
            return_freed_memory()
            part.loss.backward()
        part = part.detached()
        norm = self.finite_total(norms)
        factor = self.factor(norm)
        return_freed_memory()
        again = make()
        with self.arriving(lambda parameter, gradient: self.step_one(gradient, factor)):
            return_freed_memory()
            again.loss.backward()
        return [part], norm

    def step_one(self, gradient: Tensor, factor: Tensor) -> None:
        """Step the one parameter that has a gradient now: the optimizer passes over the others."""
        gradient.mul_(factor)
        self.optimizer.step()

    @contextmanager
    def arriving(self, arrived: Callable[[nn.Parameter, Tensor], None]) -> Iterator[None]:
        """Within the block each gradient of a backward goes to ``arrived`` and is then freed."""
        seen: set[nn.Parameter] = set()

        def hook(parameter: nn.Parameter) -> None:
            if parameter in seen:
                # Reentrant checkpoints run a backward of their own for each use of a weight.
                raise SelfCheckError(
                    "a gradient arrived in two parts, and the first was already used: set "
                    "optimizer_in_backward to false"
                )
            seen.add(parameter)
            assert parameter.grad is not None
            arrived(parameter, parameter.grad)
            parameter.grad = None
            # Kernels write weights behind autograd's back: this lets it refuse a backward that
            # would still read the weight's old value, instead of going on with the new one.
            torch.autograd.graph.increment_version(parameter)

        handles = [p.register_post_accumulate_grad_hook(hook) for p in self.parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def no_gradients_left(self) -> Iterator[None]:
        """No gradient from elsewhere takes part in the step, and none outlives it or an error."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def factor(self, norm: Tensor) -> Tensor:
        """What scales a gradient of this norm, as in `torch.nn.utils.clip_grad_norm_`."""
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def total(self, norms: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The norm of all gradients, from theirs; the order of arrival does not matter."""
        ordered = [norms[p] for p in self.parameters if p in norms]
        if not ordered:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack([n.to(ordered[0].device) for n in ordered]))

    def finite_total(self, norms: Mapping[nn.Parameter, Tensor]) -> Tensor:
        norm = self.total(norms)
        if not norm.isfinite():
            for p in self.parameters:
                if p in norms and not norms[p].isfinite():
                    raise NonFiniteStep(self.broken(p, norms[p]))
            raise NonFiniteStep("the norm of all gradients is too large for float32")
        return norm

    def broken(self, parameter: nn.Parameter, norm: Tensor) -> str:
        name = self.names.get(parameter, f"a weight of shape {list(parameter.shape)}")
        return f"the gradient of {name} has a norm of {float(norm)}"


def only(losses: Iterable[Callable[[], P]]) -> Callable[[], P]:
    """The one loss of a minibatch.

    Raises:
        UserError: there are several.
    """
    made = list(losses)
    if len(made) != 1:
        raise UserError(
            f"optimizer_in_backward needs a minibatch in one microbatch, and this one has "
            f"{len(made)}; raise microbatch_tokens or num_mini_batches, or set "
            "optimizer_in_backward to false"
        )
    return made[0]


def refuse_broken(parts: Sequence[Part]) -> None:
    """Raise NonFiniteStep for losses that are not finite; one wait for the device."""
    total = torch.stack([part.loss.detach() for part in parts]).sum()
    if not total.isfinite():
        raise NonFiniteStep(f"the loss is {float(total)}")
