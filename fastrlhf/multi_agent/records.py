"""What a training of agents leaves behind: its summary, and dialogues as lines of samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from .matrix import WinRates
from .players import Played

__all__ = ["MultiAgentSummary", "sample_of"]


@dataclass(frozen=True)
class MultiAgentSummary:
    """How a run ended. Figures are of dialogues from held-out starts, all agents as they are."""

    before: Mapping[str, float]  # <agent>/reward and the game's own figures, untrained
    after: Mapping[str, float]  # the same at the end
    steps: int  # rounds
    seconds: float
    phase_seconds: Mapping[str, float]
    folder: str
    matrices: Sequence[WinRates]  # the first agent's, or everyone's where there are more than two


def sample_of(played: Played, row: int) -> dict[str, Any]:
    """A dialogue as a line of samples.jsonl: `prompt` is the start, `completion` what was said."""
    dialogue, rewards = played.dialogues[row], played.rewards[row]
    judged = [reward for reward in rewards if reward is not None]
    said = [f"{turn.agent}: {' '.join(turn.text.split())!r}" for turn in dialogue.turns]
    return {
        "prompt": json.dumps(dict(dialogue.start), ensure_ascii=False),
        "completion": " | ".join(said),
        "score": fmean(judged) if judged else None,
        "turns": [asdict(turn) for turn in dialogue.turns],
        "rewards": rewards,
    }
