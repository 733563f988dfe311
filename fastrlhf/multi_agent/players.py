"""Dialogues played: all that are due speak at once, one batch for each agent and past self."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from statistics import fmean
from typing import Any

import torch
from torch import Generator, Tensor

from ..backbone import SharedBackbone
from ..data import PromptSet
from ..errors import UserError
from ..out_of_memory import sampled
from ..pretrained import context_length
from ..rollout.decode import DecodeEngine
from ..rollout.engines import own_engine
from ..rollout.groups import join
from ..types import Rollout
from .config import MultiAgentConfig
from .game import Dialogue, Game, Prompt, Start, Turn, checked_rewards, next_speaker, shown
from .pool import Pool, Seats

__all__ = ["Played", "Players", "Spoken"]


@dataclass(frozen=True)
class Spoken:
    """Turns that one agent took at the same time."""

    agent: str
    past: int | None  # the step of the past self that spoke; None: the agent as it is now
    number: int  # which turns of their dialogues, from 0
    rows: Sequence[int]  # whose turns: the dialogues' places in the batch
    rollout: Rollout  # [len(rows)] what they saw and said


@dataclass(frozen=True)
class Played:
    """Dialogues that are over."""

    dialogues: Sequence[Dialogue]
    rewards: Sequence[Sequence[float | None]]  # of each dialogue's turns
    seats: Sequence[Seats]  # of each dialogue: who was a past self
    spoken: Sequence[Spoken]

    def turns_of(self, agent: str) -> tuple[Rollout, Tensor] | None:
        """What ``agent``, as it is now, said, and its rewards, [n], NaN where not judged.

        None: it said nothing that was judged.
        """
        own = [s for s in self.spoken if s.agent == agent and s.past is None]
        if not own:
            return None
        rewards = [self.rewards[row][s.number] for s in own for row in s.rows]
        scores = torch.tensor([torch.nan if r is None else r for r in rewards])
        if scores.isnan().all():
            return None
        rollouts = [s.rollout for s in own]
        return reduce(joined, rollouts), scores.to(rollouts[0].tokens.device)

    def earned(self, agent: str, among: Sequence[int] | None = None) -> float | None:
        """Mean reward of an agent's judged turns in the dialogues ``among`` these; None: none."""
        rows = range(len(self.dialogues)) if among is None else among
        found = [
            reward
            for row in rows
            for turn, reward in zip(self.dialogues[row].turns, self.rewards[row], strict=True)
            if turn.agent == agent and reward is not None
        ]
        return fmean(found) if found else None


def joined(a: Rollout, b: Rollout) -> Rollout:
    return join(a, torch.arange(len(a.tokens)), b, torch.arange(len(b.tokens)))


class Players:
    """The agents of a game on one backbone, as they are now and as they were.

    Args:
        configs: by agent; response_length is that of its turns.
    """

    def __init__(
        self,
        backbone: SharedBackbone,
        tokenizer: Any,
        game: Game,
        configs: Mapping[str, MultiAgentConfig],
        pool: Pool,
    ):
        self.backbone, self.tokenizer, self.game, self.pool = backbone, tokenizer, game, pool
        self.engines = {agent: own_engine(backbone, tokenizer, configs[agent]) for agent in configs}
        for engine in self.engines.values():
            engine.stop = stop_token(game, tokenizer)

    def play(
        self,
        starts: Sequence[Start],
        generator: Generator,
        seats: Sequence[Seats] | None = None,
        setting: str = "batch_size",
    ) -> Played:
        """Play a dialogue from every start.

        Args:
            generator: what the agents say is drawn with it.
            seats: for each dialogue, who is a past self. None: nobody is.
            setting: what to lower where memory does not do for them all.

        Raises:
            UserError: what the game says of a turn cannot be, by agent and turn.
        """
        seats = [{} for _ in starts] if seats is None else seats
        dialogues = [Dialogue(start) for start in starts]
        spoken: list[Spoken] = []
        going = list(range(len(starts)))
        while going:
            due: dict[tuple[str, int | None], list[int]] = {}
            for row in going:
                if (agent := next_speaker(self.game, dialogues[row])) is not None:
                    due.setdefault((agent, seats[row].get(agent)), []).append(row)
            for (agent, past), rows in due.items():
                prompts = [shown(self.game, dialogues[row], agent) for row in rows]
                number = len(dialogues[rows[0]].turns)
                rollout = self.speak(agent, past, number, prompts, generator, setting)
                spoken.append(Spoken(agent, past, number, rows, rollout))
                for row, text in zip(rows, rollout.completions, strict=True):
                    said = text.removesuffix(self.game.stop or "")
                    dialogues[row] = dialogues[row].then(Turn(agent, said))
            going = sorted(row for rows in due.values() for row in rows)
        rewards = [checked_rewards(self.game, dialogue) for dialogue in dialogues]
        return Played(dialogues, rewards, seats, spoken)

    def speak(
        self,
        agent: str,
        past: int | None,
        number: int,
        prompts: Sequence[Prompt],
        generator: Generator,
        setting: str,
    ) -> Rollout:
        """The turns of an agent, or of its past self, to what it sees."""
        engine: DecodeEngine = self.engines[agent]
        try:
            given = PromptSet.tokenize(
                [{"prompt": prompt} for prompt in prompts],
                self.tokenizer,
                context=context_length(self.backbone.decoder.config),
                response_length=engine.response_length,
            )
        except UserError as error:
            raise UserError(f"turn {number + 1}, {agent}: {error}") from error
        generate = partial(engine.generate, given.batch(self.backbone.device), generator)
        with self.pool.playing(agent, past), self.backbone.policy_is(agent):
            return sampled(generate, len(prompts), f"lower {setting}")


def stop_token(game: Game, tokenizer: Any) -> int:
    """The token that ends a turn.

    Raises:
        UserError: the game's stop is not one token.
    """
    if game.stop is None:
        return tokenizer.eos_token_id
    ids = tokenizer(game.stop, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(
            f"game {game.name} ends turns with {game.stop!r}, which is {len(ids)} tokens; set stop "
            "to the text of one, or to None for the end-of-sequence token"
        )
    return ids[0]
