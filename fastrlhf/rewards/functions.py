"""Reward functions: prompts and completions in, one score a completion out.

A reward function takes keywords `prompts`, `completions` (texts), `completion_ids` (lists of token
ids) and the data set's other columns as lists, and returns one float per completion, or None for a
completion that it does not judge (which then does not train). The convention is TRL's.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, nearest
from ..types import Rollout

__all__ = ["REWARDS", "RewardFunction", "RewardScorer", "load_reward", "sentiment"]

RewardFunction = Callable[..., Sequence[float | None]]


def sentiment(completions: Sequence[str], **_: object) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 to 1 (Hutto and Gilbert 2014).

    The reward of Ziegler et al. 2019 in small: a rule-based judge in the place of their classifier.

        >>> sentiment(completions=["a wonderful film"])
        [0.5719]
    """
    analyzer = vader()
    return [analyzer.polarity_scores(text)["compound"] for text in completions]


@functools.cache
def vader():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "the reward 'sentiment' needs vaderSentiment; run: pip install vaderSentiment"
        ) from error
    return SentimentIntensityAnalyzer()


REWARDS: dict[str, RewardFunction] = {"sentiment": sentiment}


def load_reward(name: str) -> RewardFunction:
    """A shipped reward by name, or the function that `path/to/file.py:function` names.

    Raises:
        UserError: no such reward, file or function, or a file that fails on import.
    """
    if name in REWARDS:
        return REWARDS[name]
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise UserError(f"no reward {name!r}: give file.py:function; {nearest(name, REWARDS)}")
    if not Path(path).is_file():
        raise UserError(f"the reward's file {path} does not exist")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is the user's to see
        raise UserError(f"{path} fails on import: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function {function!r}; {nearest(function, dir(module))}")
    return getattr(module, function)


class RewardScorer:
    """Calls a reward function on a rollout and refuses answers that cannot be trained on."""

    def __init__(self, function: RewardFunction):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def probe(self, prompts: Sequence[str], columns: Sequence[dict]) -> None:
        """Call the function once before any time is lost, on a made-up completion a prompt."""
        self.judge(
            list(prompts), [" It is what it is."] * len(prompts), [[0]] * len(prompts), columns
        )

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores of a rollout, [B] float32; NaN where the function returned None."""
        prompts = rollout.prompts
        scores = self.judge(
            prompts.texts, rollout.completions, rollout.completion_ids(), prompts.columns
        )
        return torch.tensor(
            [math.nan if score is None else score for score in scores],
            dtype=torch.float32,
            device=rollout.tokens.device,
        )

    def judge(self, prompts, completions, completion_ids, columns) -> list[float | None]:
        keys = sorted(set().union(*columns)) if columns else []
        extra = {key: [row.get(key) for row in columns] for key in keys}
        try:
            scores = self.function(
                prompts=list(prompts),
                completions=list(completions),
                completion_ids=completion_ids,
                **extra,
            )
        except UserError:
            raise
        except Exception as error:  # whatever the user's function raises is the user's to see
            raise UserError(
                f"the reward {self.name!r} raised {type(error).__name__}: {error}; "
                "it is called with keywords prompts, completions, completion_ids and the columns"
            ) from error
        return self.checked(scores, completions)

    def checked(self, scores, completions) -> list[float | None]:
        try:
            scores = list(scores)
        except TypeError as error:
            raise UserError(
                f"the reward {self.name!r} returned {type(scores).__name__}; "
                "return a list with one float per completion"
            ) from error
        if len(scores) != len(completions):
            raise UserError(
                f"the reward {self.name!r} returned {len(scores)} scores for {len(completions)} "
                "completions; return one each, in order"
            )
        for index, score in enumerate(scores):
            if score is None:
                continue
            try:
                scores[index] = float(score)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"the reward {self.name!r} returned {score!r} for completion {index}; "
                    "return a float or None"
                ) from error
            if not math.isfinite(scores[index]):
                raise UserError(
                    f"the reward {self.name!r} returned {score} for completion {index} "
                    f"({completions[index][:60]!r}); return a finite number, or None to skip it"
                )
        return scores
