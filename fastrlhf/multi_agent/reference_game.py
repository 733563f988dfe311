"""A cooperative game: one word of several is meant, and only the speaker knows which.

The speaker sees the words and the target and gives a hint; the listener sees the words, in an order
of its own, and the hint, and says a word. Both earn 1 if it is the target, else 0 (Lewis 1969; as a
game of language models: Lazaridou et al. 2017). Two moves are against the rules and cost who makes
them 1: a hint that names the target, which also ends the dialogue (a word that begins as the target
does, with its first four letters or all of a shorter one, or the target within another word), and
an answer that is none of the words. Words are held out, not sets of them: what is learnt about a
word is of no use there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Generator

from ..algorithm_settings import require
from .game import Dialogue, Start

__all__ = ["WORDS", "ReferenceGame"]

NOUNS = (
    "apple arm baby bag ball bank bear bed bell bird boat body bone book bottle bowl box bread "
    "bridge brush building bus butter button cake camera camp car cat chair cheese chicken child "
    "church circle city clock cloth cloud coat coffee computer cow cup dance desk dinner doctor "
    "dog door dress egg engine eye face farm fire fish flag flower foot forest fruit game garden "
    "girl glass gold grass guitar gun hair hammer hand hat heart horse hospital hotel house ice "
    "island jacket juice key king kitchen knife lake lamp leaf leg letter library lion map market "
    "meat milk mirror money moon mountain mouse mouth movie music nail needle newspaper night nose "
    "nurse ocean oil orange paint paper park pen phone piano picture pig pizza plane plant poem "
    "police prison queen rain ring river road rock roof rose salt school sea sheep ship shirt shoe "
    "silver sister snake snow soap song soup spoon star stone storm sugar sun sword table tea "
    "teacher temple ticket tiger tooth tower town toy train tree truck uncle village wall watch "
    "water wheel wind window wine wolf wood"
)
WORDS = NOUNS.split()
"""common nouns, each one token of SmolLM2's vocabulary after a space"""

SPEAKER, LISTENER = "speaker", "listener"
SPEAKER_SEES = "{words}\nA {target} is a type of"
LISTENER_SEES = "sun, dog, car; animal = dog\n{words};{hint} ="
"""one example: without it a small model answers with anything but one of the words"""


class ReferenceGame:
    """The game, of its words.

    Args:
        words: what can be meant; at least 4 times ``candidates``.
        candidates: words that a dialogue shows.
        hint_tokens, answer_tokens: how long the two turns may be.
        held_out_share: of the words, which training never shows.
        seed: draws which are held out.
        speaker_sees, listener_sees: the prompts, with {words}, {target} and {hint}.
    """

    name = "reference game"
    agents = (SPEAKER, LISTENER)
    max_turns = 2
    bounds = (-1.0, 1.0)

    def __init__(
        self,
        words: Sequence[str] = WORDS,
        *,
        candidates: int = 3,
        hint_tokens: int = 2,
        answer_tokens: int = 1,
        held_out_share: float = 0.25,
        seed: int = 1,
        speaker_sees: str = SPEAKER_SEES,
        listener_sees: str = LISTENER_SEES,
        stop: str | None = "\n",
    ):
        require(candidates >= 2, "candidates must be at least 2")
        require(0 < held_out_share < 1, "held_out_share must lie between 0 and 1")
        require(len(set(words)) == len(words), "words must be different")
        self.candidates, self.stop = candidates, stop
        self.turn_tokens: Mapping[str, int] = {SPEAKER: hint_tokens, LISTENER: answer_tokens}
        self.speaker_sees, self.listener_sees = speaker_sees, listener_sees
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
        held = round(held_out_share * len(words))
        self.held_out = [words[i] for i in order[:held]]
        self.trained = [words[i] for i in order[held:]]
        fewest = min(len(self.held_out), len(self.trained))
        require(
            fewest >= candidates,
            f"{fewest} words are too few to draw {candidates} from; give more words",
        )

    def deal(self, count: int, generator: Generator, held_out: bool) -> list[Start]:
        """Words, which of them is meant, and the order in which the listener sees them."""
        words = self.held_out if held_out else self.trained
        starts: list[Start] = []
        for _ in range(count):
            drawn = torch.randperm(len(words), generator=generator)[: self.candidates].tolist()
            shown = [words[i] for i in drawn]
            # The first drawn is meant; each of the two sees an order that says nothing of it.
            orders = [torch.randperm(len(shown), generator=generator).tolist() for _ in range(2)]
            to_speaker, to_listener = ([shown[i] for i in order] for order in orders)
            starts.append({"target": shown[0], SPEAKER: to_speaker, LISTENER: to_listener})
        return starts

    def next_agent(self, dialogue: Dialogue) -> str | None:
        """The speaker, then the listener, unless the hint names the target."""
        if not dialogue.turns:
            return SPEAKER
        return LISTENER if len(dialogue.turns) == 1 and not names(dialogue) else None

    def prompt(self, dialogue: Dialogue, agent: str) -> str:
        """What the agent sees; the hint is the first line that the speaker said."""
        words = ", ".join(dialogue.start[agent])
        if agent == SPEAKER:
            return self.speaker_sees.format(words=words, target=dialogue.start["target"])
        return self.listener_sees.format(words=words, hint=hint_of(dialogue))

    def rewards(self, dialogue: Dialogue) -> list[float | None]:
        """1 for both if the target was found, else 0; who breaks a rule pays 1 alone."""
        if names(dialogue):
            return [-1.0]
        if not self.chosen(dialogue):
            # It says nothing of the hint: the speaker learns nothing from it.
            return [None, -1.0]
        return [float(self.found(dialogue))] * 2

    def won(self, dialogue: Dialogue, agent: str) -> float:
        """Both win or lose together."""
        return float(self.found(dialogue))

    def found(self, dialogue: Dialogue) -> bool:
        """Whether the listener said the target."""
        return self.answer(dialogue) == dialogue.start["target"].lower()

    def chosen(self, dialogue: Dialogue) -> bool:
        """Whether the listener said one of the words that it saw."""
        return self.answer(dialogue) in [word.lower() for word in dialogue.start[LISTENER]]

    def answer(self, dialogue: Dialogue) -> str | None:
        said = dialogue.said_by(LISTENER)
        return said[0].strip(" .,\n").lower() if said else None

    def figures(self, dialogues: Sequence[Dialogue]) -> dict[str, float]:
        """Share of targets found; of hints that name theirs; of answers that are a word shown."""
        answered = [d for d in dialogues if d.said_by(LISTENER)]
        hints = [hint_of(d) for d in dialogues]
        return {
            "success": fmean(self.found(d) for d in dialogues),
            "named": fmean(names(d) for d in dialogues),
            "chosen": fmean(self.chosen(d) for d in answered) if answered else 0.0,
            "distinct_hints": len(set(hints)) / len(hints),
        }


def hint_of(dialogue: Dialogue) -> str:
    """The first line that the speaker said, with the space that it began with."""
    (said, *_) = dialogue.said_by(SPEAKER)
    return (said.rstrip().split("\n") or [""])[0] if said.strip() else ""


def names(dialogue: Dialogue) -> bool:
    """Whether the hint names the target."""
    target: str = dialogue.start["target"].lower()
    hint = hint_of(dialogue).lower()
    begins = any(word.startswith(target[:4]) for word in re.findall(r"\w+", hint))
    return begins or (len(target) >= 4 and target in hint)
