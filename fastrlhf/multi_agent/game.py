"""What a game is, and a dialogue in it: who speaks, what each speaker sees, what a turn earns.

A turn is a sequence of its own: its prompt is what the game shows the speaker of the dialogue so
far, its response is what the speaker says. Nothing is masked within a sequence, and nothing needs
to be: what others said is prompt, and prompts never train (docs/multi_agent.md). One long sequence
would be wrong where agents see different things, like a target that only one of them knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Generator

from ..errors import UserError, nearest

__all__ = [
    "Dialogue",
    "Game",
    "Turn",
    "check_game",
    "checked_rewards",
    "next_speaker",
    "rules_of",
    "shown",
]

Start = Mapping[str, Any]
Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Turn:
    """What one agent said."""

    agent: str
    text: str  # without the token that ended it; may be empty: a policy may say nothing


@dataclass(frozen=True)
class Dialogue:
    """A game so far."""

    start: Start  # what was dealt
    turns: tuple[Turn, ...] = ()

    def then(self, turn: Turn) -> Dialogue:
        """The dialogue with one more turn."""
        return replace(self, turns=(*self.turns, turn))

    def said_by(self, agent: str) -> list[str]:
        """The texts of an agent's turns."""
        return [turn.text for turn in self.turns if turn.agent == agent]


@runtime_checkable
class Game(Protocol):
    """The rules of a dialogue in turns. It keeps no state: all that happened is in the dialogue."""

    name: str
    agents: Sequence[str]  # each is a policy of the backbone, under this name
    turn_tokens: Mapping[str, int]  # by agent: tokens of a turn at most
    max_turns: int  # no dialogue is longer
    bounds: tuple[float, float]  # of a turn's reward
    stop: str | None  # the text of the token that ends a turn; None: the end-of-sequence token

    def deal(self, count: int, generator: Generator, held_out: bool) -> Sequence[Start]:
        """So many starts, which JSON can hold; ``held_out`` ones are never trained on."""

    def next_agent(self, dialogue: Dialogue) -> str | None:
        """Who speaks now; None: the dialogue is over."""

    def prompt(self, dialogue: Dialogue, agent: str) -> Prompt:
        """What ``agent``, who speaks now, sees: text, or chat messages."""

    def rewards(self, dialogue: Dialogue) -> Sequence[float | None]:
        """What each turn of a dialogue that is over has earned its speaker, in the turns' order.

        None: the turn is not judged, and trains nothing.
        """

    def won(self, dialogue: Dialogue, agent: str) -> float | None:
        """How far ``agent`` has won, from 0 to 1; None: the dialogue does not count."""

    def figures(self, dialogues: Sequence[Dialogue]) -> Mapping[str, float]:
        """What else is to be known of dialogues that are over, by name."""


def check_game(game: Any) -> Game:
    """``game``, whose facts fit together.

    Raises:
        UserError: it is no game, or says nothing of one of its agents.
    """
    if not isinstance(game, Game):
        named = (*Game.__annotations__, *vars(Game))
        parts = [x for x in named if not x.startswith("_") and not hasattr(game, x)]
        raise UserError(
            f"{type(game).__name__} is no game: it lacks {', '.join(sorted(parts))}; see "
            "fastrlhf.multi_agent.Game"
        )
    if not game.agents or len(set(game.agents)) < len(game.agents):
        raise UserError(f"game {game.name} has the agents {list(game.agents)}; name each once")
    for agent in game.agents:
        if game.turn_tokens.get(agent, 0) < 1:
            raise UserError(f"game {game.name}: turn_tokens must give {agent!r} at least 1 token")
    for agent in game.turn_tokens:
        known_agent(game, agent, "turn_tokens")
    if game.max_turns < 1:
        raise UserError(f"game {game.name}: max_turns must be at least 1")
    low, high = game.bounds
    if not low < high:
        raise UserError(f"game {game.name}: bounds are {low:g} and {high:g}; the lower comes first")
    return game


def known_agent(game: Game, agent: str, where: str) -> str:
    """``agent``, who is one of the game's."""
    if agent not in game.agents:
        raise UserError(
            f"{where}: {agent!r} is no agent of {game.name}; {nearest(agent, game.agents)}"
        )
    return agent


def next_speaker(game: Game, dialogue: Dialogue) -> str | None:
    """Who speaks now; None at the end.

    Raises:
        UserError: somebody who is no agent of the game, or a dialogue that does not end.
    """
    agent, number = game.next_agent(dialogue), len(dialogue.turns) + 1
    if agent is None:
        return None
    known_agent(game, agent, f"turn {number}")
    if number > game.max_turns:
        raise UserError(
            f"game {game.name} does not end: {agent} is to speak in turn {number}, and max_turns "
            f"is {game.max_turns}; let next_agent return None, or raise max_turns"
        )
    return agent


def shown(game: Game, dialogue: Dialogue, agent: str) -> Prompt:
    """What ``agent`` sees in the turn that is its own.

    Raises:
        UserError: it sees nothing.
    """
    prompt = game.prompt(dialogue, agent)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError(
            f"turn {len(dialogue.turns) + 1}: {agent}'s prompt is empty text; let the game's "
            "prompt() return what the agent sees"
        )
    return prompt


def checked_rewards(game: Game, dialogue: Dialogue) -> list[float | None]:
    """The rewards of a dialogue's turns, each a finite number within the bounds, or None.

    Raises:
        UserError: anything else, by agent and turn.
    """
    given = list(game.rewards(dialogue))
    if len(given) != len(dialogue.turns):
        raise UserError(
            f"game {game.name} gave {len(given)} rewards for a dialogue of {len(dialogue.turns)} "
            "turns; give one for each, None where a turn is not judged"
        )
    low, high = game.bounds
    rewards: list[float | None] = []
    for number, (turn, reward) in enumerate(zip(dialogue.turns, given, strict=True), start=1):
        where = f"the reward of {turn.agent} for turn {number}, {turn.text!r}, is {reward!r}"
        if reward is None:
            rewards.append(None)
            continue
        try:
            value = float(reward)
        except (TypeError, ValueError):
            raise UserError(f"{where}; give a number, or None") from None
        if not math.isfinite(value):
            raise UserError(f"{where}; give a finite number, or None for no judgement")
        if not low <= value <= high:
            raise UserError(f"{where}, out of the game's bounds {low:g} to {high:g}; widen them")
        rewards.append(value)
    return rewards


def rules_of(game: Game) -> dict[str, Any]:
    """What a run that goes on must find as it was: the game's parts, and its settings that are
    numbers, texts or lists of them."""

    def plain(x: Any) -> bool:
        if isinstance(x, Mapping):
            return all(map(plain, x.values()))
        return all(map(plain, x)) if isinstance(x, (list, tuple)) else isinstance(x, PLAIN)

    parts = ("name", "agents", "turn_tokens", "stop", "max_turns", "bounds")
    named = {part: getattr(game, part) for part in parts} | getattr(game, "__dict__", {})
    return {name: value for name, value in named.items() if plain(value)}


PLAIN = (str, int, float, bool, type(None))
