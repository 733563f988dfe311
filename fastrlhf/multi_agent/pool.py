"""Past selves: every so often all agents' adapters are kept, and met again later.

An agent that learns against the others as they are now chases them, and forgets how to answer what
they did before. Meeting past selves as well (fictitious self-play: Heinrich et al. 2015; the pool
of OpenAI Five and AlphaStar) makes what it learns against change slowly. Snapshots are in host
memory, a few MB each, and on disk as PEFT adapters: `snapshots/step-000010/<agent>`. While a past
self speaks its numbers are in the agent's own adapter, which then gets its own back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from ..backbone import SharedBackbone
from ..checkpoint import ADAPTER, in_place
from ..errors import UserError
from .config import MultiAgentConfig

__all__ = ["Pool", "Seats"]

# By agent, the step of the past self that plays in its place.
Seats = Mapping[str, int]


class Pool:
    """The past selves of all agents on a backbone.

    Args:
        agents: every agent of the game.
        folder: of the run, once it is there; None keeps nothing on disk.
    """

    def __init__(
        self,
        backbone: SharedBackbone,
        agents: Sequence[str],
        config: MultiAgentConfig,
        folder: Callable[[], Path] | None = None,
    ):
        self.backbone, self.agents, self.config, self.folder = backbone, agents, config, folder
        self.kept: dict[int, dict[str, list[Tensor]]] = {}
        self.sums: dict[int, list[str]] = {}  # a checksum of each agent's numbers

    @property
    def steps(self) -> list[int]:
        """The rounds after which the past selves were kept, oldest first."""
        return list(self.kept)

    def keep(self, step: int) -> None:
        """Keep all agents as they are after ``step`` rounds; the oldest go beyond pool_size."""
        if step in self.kept:
            return
        self.kept[step] = {agent: copies(self.own(agent)) for agent in self.agents}
        self.sums[step] = [checksum(self.kept[step][agent]) for agent in self.agents]
        for oldest in self.steps[: -self.config.pool_size]:
            del self.kept[oldest], self.sums[oldest]
        if self.folder is not None:
            names = [name for agent in self.agents for name in self.backbone.adapters_of(agent)]
            try:
                with in_place(self.path(step)) as made:
                    self.backbone.adapters.save(made, names)
            except OSError as error:
                raise UserError(
                    f"{self.path(step)}, the agents as they are now, cannot be written ({error}); "
                    "free space there, and go on from the last checkpoint with "
                    "train(resume_from_checkpoint=True)"
                ) from error

    def path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder() / "snapshots" / f"step-{step:06d}"

    def own(self, agent: str) -> list[nn.Parameter]:
        return self.backbone.role_parameters(agent)

    def draw(self, generator: Generator) -> int:
        """The step of one past self."""
        steps = self.steps
        if self.config.pool_sampling == "uniform":
            weights = torch.ones(len(steps))
        else:
            weights = 0.5 ** torch.arange(len(steps) - 1, -1, -1.0)
        return steps[int(torch.multinomial(weights, 1, generator=generator))]

    def seats(self, count: int, learners: Sequence[str], generator: Generator) -> list[Seats]:
        """Who plays in each of ``count`` dialogues.

        In the last of them, a share of pool_share, one learner meets past selves of all others, who
        were kept at the same time. All such dialogues of a learner are with the same ones: one
        draw a round costs one more call of each agent.
        """
        seats: list[Seats] = [{} for _ in range(count)]
        if len(self.agents) == 1 or not self.kept:
            return seats
        share = int(self.config.pool_share * count)
        drawn = {agent: self.draw(generator) for agent in learners}
        for place in range(share):
            learner = learners[place % len(learners)]
            others = [agent for agent in self.agents if agent != learner]
            seats[count - share + place] = {agent: drawn[learner] for agent in others}
        return seats

    @contextmanager
    def playing(self, agent: str, step: int | None) -> Iterator[None]:
        """Within the block ``agent`` is its past self of ``step``; None: it is what it is now."""
        if step is None:
            yield
            return
        now = copies(self.own(agent))
        fill(self.own(agent), self.kept[step][agent])
        try:
            yield
        finally:
            fill(self.own(agent), now)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": list(self.sums.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read the past selves of a run that goes on from its folder.

        Raises:
            UserError: one is missing, cannot be read, or is not what was written.
        """
        self.kept, self.sums = {}, dict(zip(state["steps"], state["sums"], strict=True))
        for step, sums in self.sums.items():
            self.kept[step] = {}
            for agent, known in zip(self.agents, sums, strict=True):
                path = self.path(step) / agent / ADAPTER
                if not path.is_file():
                    raise UserError(
                        f"{path}, a past self, is missing; put it back, or start a new run"
                    )
                now = copies(self.own(agent))
                try:
                    odd = self.backbone.adapters.fill(agent, load_file(path))
                except (OSError, SafetensorError, RuntimeError) as error:
                    raise unusable(path, str(error)) from error
                if odd:
                    raise unusable(path, f"it and the run's adapter differ in {odd[0]}")
                self.kept[step][agent] = copies(self.own(agent))
                fill(self.own(agent), now)
                if checksum(self.kept[step][agent]) != known:
                    raise unusable(path, "its checksum is not that of what was written")


def unusable(path: Path, why: str) -> UserError:
    return UserError(f"{path}, a past self, cannot be read ({why}); start a new run")


def copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The parameters' numbers, in host memory."""
    return [p.detach().to("cpu", copy=True) for p in parameters]


def checksum(numbers: Sequence[Tensor]) -> str:
    total = hashlib.sha256()
    for x in numbers:
        total.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def fill(parameters: Sequence[nn.Parameter], numbers: Sequence[Tensor]) -> None:
    for parameter, x in zip(parameters, numbers, strict=True):
        parameter.copy_(x)
