"""Reward functions: prompts and completions in, one score a completion out, and where to get them.

A reward function takes keywords `prompts`, `completions` (texts), `completion_ids` (lists of token
ids) and the data set's other columns as lists, and returns one float per completion, or None for a
completion that it does not judge (which then does not train). The convention is TRL's. Beyond it a
function may return a list of floats per completion, one for each objective, and may be a coroutine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, nearest
from ..reward_settings import RewardSettings
from ..types import Rollout
from . import answers, texts
from .checked_answers import checked_answer
from .registry import REWARDS, Objective, RewardFunction, parse
from .remote import RemoteReward, attempts, wait_for
from .shaping import ObjectiveShaper, weighted_sum

__all__ = [
    "REWARDS",
    "RewardFunction",
    "RewardScorer",
    "load_objectives",
    "load_reward",
    "sentiment",
]

sentiment = texts.sentiment
# Importing it has registered its rewards.
assert answers.exact_answer.__name__ in REWARDS

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
"""what a function of the user's raises where it is wrong itself; asking again does not help"""


def load_reward(name: str) -> RewardFunction:
    """One reward by its name, path or address.

    Raises:
        UserError: no such reward, file or function, a file that fails on import, or a sum, whose
            weights a function alone does not have.
    """
    objectives = load_objectives(name)
    if len(objectives) > 1 or objectives[0].weight != 1:
        raise UserError(
            f"the reward {name!r} is a sum with weights, and load_reward gives one function; call "
            f"load_objectives({name!r})"
        )
    return objectives[0].function


def load_objectives(reward: Any, timeout: float = 60.0) -> list[Objective]:
    """The objectives that ``reward`` names: see `reward_settings.RewardSettings.reward`.

    Args:
        reward: a name, a function, or a list of these.
        timeout: seconds for each answer from an address.
    """
    if callable(reward):
        return [Objective(getattr(reward, "__name__", type(reward).__name__), reward)]
    if not isinstance(reward, str):
        found = [x for one in reward for x in load_objectives(one, timeout)]
        names = [x.name for x in found]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two rewards are named {doubled[0]!r}; give one of them another name")
        return found
    if reward.startswith(("http://", "https://")):
        return [Objective(reward, RemoteReward(reward, timeout))]
    path, colon, function = reward.rpartition(":")
    if colon and path.endswith(".py"):
        return [Objective(function, load_from_file(path, function))]
    if reward.endswith(".py"):
        raise UserError(f"the reward {reward!r} is a file: write {reward}:{functions_in(reward)}")
    named = reward in REWARDS  # whatever folder has the same name
    if not named and (Path(reward.partition("#")[0]).is_dir() or is_hub_name(reward)):
        from .classifier import load_classifier
        from .model import folder_name

        name = folder_name(reward) if Path(reward).is_dir() else Path(reward).name
        return [Objective(name, load_classifier(reward))]
    if not set(reward) & set(" +*()") and "/" in reward:
        raise UserError(
            f"no folder {reward!r}: give one that `fastrlhf reward` wrote, or a model for sequence "
            "classification"
        )
    if reward.isidentifier() and not named:
        raise UserError(f"no reward {reward!r}: give file.py:function; {nearest(reward, REWARDS)}")
    return parse(reward)


def is_hub_name(name: str) -> bool:
    """Whether a name can be one of a hub, like `someone/judge#POSITIVE`."""
    words = name.partition("#")[0].split("/")
    return len(words) == 2 and all(word and not set(word) & set(" +*()") for word in words)


def functions_in(path: str) -> str:
    """The functions of a file, as a hint; whatever is wrong with it is said when it is loaded."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return "function"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    names = [x.name for x in tree.body if isinstance(x, kinds) and not x.name.startswith("_")]
    return names[0] if len(names) == 1 else f"function (it has {', '.join(names) or 'none'})"


def load_from_file(path: str, function: str) -> RewardFunction:
    if not Path(path).is_file():
        raise UserError(f"the reward's file {path} does not exist")
    spec = importlib.util.spec_from_file_location(module_name(path), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is the user's to see
        sys.modules.pop(spec.name, None)
        raise UserError(f"{path} fails on import: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function {function!r}; {nearest(function, dir(module))}")
    return getattr(module, function)


def module_name(path: str) -> str:
    """A name that is no other module's: a file may be called statistics.py, or two mine.py."""
    whole = str(Path(path).resolve())
    stem = re.sub(r"\W", "_", Path(path).stem)
    return f"fastrlhf_reward_{stem}_{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


class RewardScorer:
    """Calls reward functions on a rollout and refuses answers that cannot be trained on.

    Args:
        reward: see `load_objectives`.
        settings: its reward_* are read.
    """

    def __init__(self, reward: Any, settings: RewardSettings | None = None):
        self.settings = settings = RewardSettings() if settings is None else settings
        self.objectives = load_objectives(reward, settings.reward_timeout)
        self.name = " + ".join(x.name for x in self.objectives)
        self.shaper = ObjectiveShaper(
            scaling=settings.reward_scaling,
            normalization=settings.reward_normalization,
            clip=settings.reward_clip,
        )
        # Of each column: what its objective is called and its weight. Known with the first answer.
        self.names: list[str] = []
        self.weights: list[float] = []
        # By objective, its columns in its last answer that had any.
        self.widths: dict[str, int] = {}
        self.sums: dict[str, list[float]] = {}

    def share(self, backbone: Any, tokenizer: Any, say: Any = lambda text: None) -> None:
        """Let reward models be roles of the policy's backbone, as reward_backbone says.

        Raises:
            UserError: they cannot be, and reward_backbone is "shared".
        """
        if self.settings.reward_backbone == "own":
            return
        for objective in self.objectives:
            if not hasattr(objective.function, "share"):
                continue
            try:
                objective.function.share(backbone, tokenizer)
            except UserError as error:
                if self.settings.reward_backbone == "shared":
                    raise
                say(f"the reward model has a base of its own: {error}")

    def probe(
        self, prompts: Sequence[str], columns: Sequence[dict], *, models: bool = False
    ) -> None:
        """Call the functions once before any time is lost, on a made-up completion a prompt.

        Args:
            models: call reward models too, which load a base of their own where none was shared.
        """
        made_up = [" It is what it is."] * len(prompts)
        for objective in self.objectives:
            if models or not hasattr(objective.function, "share"):
                self.columns(objective, list(prompts), made_up, [[0]] * len(prompts), columns)

    def __call__(self, rollout: Rollout) -> Tensor:
        """Weighted scores of a rollout as they are, [B] float32; NaN where no function judged."""
        return weighted_sum(self.table(rollout), self.weights)

    def train(self, rollout: Rollout) -> Tensor:
        """The same, scaled as the settings say; counts in the running moments and the metrics."""
        table = self.table(rollout)
        if table.shape[1] > 1 or self.shaper.changes:
            for name, column in zip(self.names, table.T, strict=True):
                judged = column[~column.isnan()]
                total = self.sums.setdefault(f"reward/{name}", [0.0, 0])
                total[0] += float(judged.sum())
                total[1] += len(judged)
        return self.shaper(table, self.weights)

    def take_metrics(self) -> dict[str, float]:
        """Each objective's mean over what `train` judged since this was called last, unscaled."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.sums = {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON."""
        functions = {o.name: o.state_dict() for o in self.objectives if o.is_stateful}
        return self.shaper.state_dict() | {"widths": self.widths, "functions": functions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.shaper.load_state_dict(state)
        self.widths = dict(state.get("widths", {}))
        for objective in self.objectives:
            if objective.name in state.get("functions", {}):
                objective.load_state_dict(state["functions"][objective.name])

    def table(self, rollout: Rollout) -> Tensor:
        """Scores by objective, [B, K] float32; NaN where a function returned None."""
        prompts = rollout.prompts
        given = (prompts.texts, rollout.completions, rollout.completion_ids(), prompts.columns)
        return self.scored(*given).to(rollout.tokens.device)

    def judge(self, prompts, completions, completion_ids, columns) -> list[float | None]:
        """Weighted scores of texts; None where no function judged."""
        table = self.scored(prompts, completions, completion_ids, columns)
        scores = weighted_sum(table.double(), self.weights).tolist()
        return [None if math.isnan(score) else score for score in scores]

    def scored(self, prompts, completions, completion_ids, columns) -> Tensor:
        parts: list[list[list[float]]] = []
        names: list[str] = []
        weights: list[float] = []
        for objective in self.objectives:
            found = self.columns(objective, prompts, completions, completion_ids, columns)
            own = getattr(objective.function, "objectives", None)
            width = len(found)
            numbered = [f"{objective.name}[{i}]" for i in range(width)]
            if own is not None and len(own) != width:
                raise UserError(
                    f"the reward {objective.name!r} names {len(own)} objectives and returned "
                    f"{width} scores a completion; make them agree"
                )
            names += list(own) if own else numbered if width > 1 else [objective.name]
            weights += [objective.weight] * width
            self.widths[objective.name] = width
            parts.append(found)
        given = self.settings.reward_weights
        if given is not None and len(given) != len(names):
            raise UserError(
                f"reward_weights has {len(given)} weights for {len(names)} objectives "
                f"({', '.join(names)}); give one each"
            )
        self.names, self.weights = names, [float(x) for x in given or weights]
        return torch.tensor([column for part in parts for column in part]).T.float()

    def columns(self, objective, prompts, completions, completion_ids, columns):
        """An objective's scores, a list of them for each of its columns; NaN for None."""
        keys = set().union(*columns) if columns else set()
        if taken := keys & {"prompts", "completions", "completion_ids"}:
            raise UserError(
                f"the data set has a column {min(taken)!r}, which is what rewards are called with; "
                "rename it"
            )
        # What the reward was set to is not the data's to change.
        keys -= getattr(objective.function, "keywords", {}).keys()
        extra = {key: [row.get(key) for row in columns] for key in sorted(keys)}
        settings = self.settings

        def call():
            answer = objective.function(
                prompts=list(prompts),
                completions=list(completions),
                completion_ids=completion_ids,
                **extra,
            )
            if inspect.isawaitable(answer):
                try:
                    answer = wait_for(answer, settings.reward_timeout)
                except (UserError, TimeoutError, ConnectionError, *FAULTS):
                    raise
                except Exception as error:  # clients have errors of their own for a lost line
                    raise ConnectionError(f"{type(error).__name__}: {error}") from error
            return answer

        try:
            scores = attempts(
                call,
                objective.name,
                timeout=settings.reward_timeout,
                retries=settings.reward_retries,
            )
        except UserError:
            raise
        except Exception as error:  # whatever the user's function raises is the user's to see
            raise UserError(
                f"the reward {objective.name!r} raised {type(error).__name__}: {error}; "
                "it is called with keywords prompts, completions, completion_ids and the columns"
            ) from error
        bounds = settings.reward_bounds or objective.bounds
        return checked_answer(
            scores, completions, objective.name, tuple(bounds), self.width(objective)
        )

    def width(self, objective: Objective) -> int:
        """How many columns an answer of None alone has."""
        own = getattr(objective.function, "objectives", None)
        weights = self.settings.reward_weights
        # Of one objective, there are as many as weights.
        alone = len(weights) if weights and len(self.objectives) == 1 else 1
        return len(own) if own else self.widths.get(objective.name, alone)
