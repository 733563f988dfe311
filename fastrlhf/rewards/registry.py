"""Rewards by name: what is registered, with which bounds, and how names are put together.

`sentiment + 0.1*length_band(20, 60)` is two objectives with weights 1 and 0.1. Whatever else a
reward can be (a function in a file, a folder, an address) is in functions.py.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, nearest

__all__ = ["REWARDS", "Objective", "RewardFunction", "parse", "register"]

# Returns a score for each completion, or a list of them; None for what it does not judge.
RewardFunction = Callable[..., Sequence[Any]]
Bounds = tuple[float, float]
UNBOUNDED = (-math.inf, math.inf)

REWARDS: dict[str, RewardFunction] = {}


def register(name: str, bounds: Bounds = UNBOUNDED) -> Callable[[RewardFunction], RewardFunction]:
    """Make a function a reward by the name ``name``, whose scores lie within ``bounds``.

    Its keyword-only parameters are its settings: `length_band(20, 60)` gives the first two.
    """

    def add(function: RewardFunction) -> RewardFunction:
        function.bounds = bounds  # type: ignore[attr-defined]
        REWARDS[name] = function
        return function

    return add


@dataclass(frozen=True)
class Objective:
    """One reward function, what it is called, and how much it counts."""

    name: str
    function: RewardFunction
    weight: float = 1.0

    @property
    def bounds(self) -> Bounds:
        """What its scores lie within, as its author declared."""
        function = self.function
        inner = function.func if isinstance(function, functools.partial) else function
        return getattr(inner, "bounds", UNBOUNDED)

    @property
    def is_stateful(self) -> bool:
        """Whether it carries something from one rollout to the next, and can give it as JSON."""
        # A classifier's weights are no such thing, and they do not change.
        is_module = hasattr(self.function, "parameters")
        both = hasattr(self.function, "state_dict"), hasattr(self.function, "load_state_dict")
        return all(both) and not is_module

    def state_dict(self) -> Any:
        """What a function that `is_stateful` carries."""
        function: Any = self.function
        return function.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Give it back."""
        function: Any = self.function
        function.load_state_dict(state)


def parse(text: str) -> list[Objective]:
    """The objectives of a sum of registered rewards, in its order.

    Raises:
        UserError: an unknown name, settings that do not fit, or something that is no such sum.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise wrong(text) from error
    objectives = [objective(node, weight, text) for node, weight in terms(tree, 1.0, text)]
    names = [x.name for x in objectives]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the reward {text!r} names {doubled[0]} twice; add up its weights")
    return objectives


def wrong(text: str) -> UserError:
    known = ", ".join(sorted(REWARDS))
    return UserError(
        f"the reward {text!r} is no sum like 'sentiment + 0.1*length_band(20, 60)' of {known}"
    )


def terms(node: ast.expr, weight: float, text: str) -> list[tuple[ast.expr, float]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        sign = 1.0 if isinstance(node.op, ast.Add) else -1.0
        return [*terms(node.left, weight, text), *terms(node.right, sign * weight, text)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return terms(node.operand, -weight, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for factor, rest in ((node.left, node.right), (node.right, node.left)):
            if (number := constant(factor)) is not None:
                return terms(rest, weight * number, text)
    if isinstance(node, ast.Name | ast.Call):
        return [(node, weight)]
    raise wrong(text)


def constant(node: ast.expr) -> float | None:
    """The number that a node is, with or without a sign; None where it is none."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        number = constant(node.operand)
        return -number if number is not None and isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    return None


def objective(node: ast.expr, weight: float, text: str) -> Objective:
    called = node.func if isinstance(node, ast.Call) else node
    if not isinstance(called, ast.Name):
        raise wrong(text)
    name = called.id
    if name not in REWARDS:
        raise UserError(f"no reward {name!r} (in {text!r}); {nearest(name, REWARDS)}")
    function = REWARDS[name]
    parameters = inspect.signature(function).parameters.values()
    settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    given: dict[str, Any] = {}
    if isinstance(node, ast.Call):
        try:
            given = dict(zip([p.name for p in settings], map(ast.literal_eval, node.args)))  # noqa: B905
            given |= {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        except (ValueError, TypeError) as error:
            raise wrong(text) from error
        if len(node.args) > len(settings) or not given.keys() <= {p.name for p in settings}:
            takes = ", ".join(p.name for p in settings) or "no settings"
            raise UserError(f"the reward {ast.unparse(node)!r} takes {takes}")
    if missing := [p.name for p in settings if p.default is p.empty and p.name not in given]:
        raise UserError(f"the reward {name!r} needs {missing[0]}: write {name}({missing[0]}=…)")
    if not settings:
        return Objective(name, function, weight)
    # Those left out too: a column of the data that has their name is not meant for them.
    given = {p.name: p.default for p in settings} | given
    bound = functools.partial(function, **given)
    functools.update_wrapper(bound, function)
    return Objective(name, bound, weight)
