"""Response modes: a name and an instruction each, and how a prompt carries the instruction.

The instruction becomes tokens of the prompt. Chat messages: it follows the last user's message, for
not every template knows a system's role. Text: it precedes the text, which the model continues. An
empty instruction leaves the prompt as it is.

No torch is imported here: a typo on the command line is told before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, nearest

__all__ = ["MODES", "read_modes", "with_instruction"]

MODES = {
    "concise": "Answer in a few words.",
    "informative": "Answer with facts and reasons.",
    "creative": "Answer with imagination, in vivid words.",
}


def read_modes(given: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Instructions by mode, in the order given.

    Args:
        given: modes and their instructions; names of MODES; or the path of a YAML or JSON file
            with either.

    Raises:
        UserError: no mode, an unknown one, one given twice, or two with the same instruction.
    """
    if isinstance(given, str):
        given = read_file(given)
    if isinstance(given, Mapping):
        modes = dict(given)
    else:
        refuse_doubled(given)
        for name in given:
            if not isinstance(name, str) or name not in MODES:
                raise UserError(
                    f"modes: {name!r} is no mode that ships; {nearest(str(name), MODES)}; for one "
                    "of your own give its instruction too, as in {terse: Answer in a word.}"
                )
        modes = {name: MODES[name] for name in given}
    if not modes:
        raise UserError(f"modes is empty; give at least one, like {next(iter(MODES))}")
    of: dict[str, str] = {}
    for name, instruction in modes.items():
        # It names metrics.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"modes: {name!r} cannot be a name; use letters, digits, - and _")
        if not isinstance(instruction, str):
            raise UserError(
                f"the mode {name!r} has {instruction!r} for its instruction; give text in quotes"
            )
        if instruction in of:
            raise UserError(
                f"the modes {of[instruction]!r} and {name!r} have the same instruction; leave one "
                "out"
            )
        of[instruction] = name
    return modes


def refuse_doubled(names: Iterable[Any]) -> None:
    names = list(names)
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"modes: {doubled[0]!r} is there twice; leave one out")


def read_file(path: str) -> Any:
    """What a YAML or JSON file of modes holds."""
    if not Path(path).is_file():
        raise UserError(f"modes: there is no file {path!r}; give one, or a list of names")
    text = Path(path).read_text(encoding="utf-8")
    try:
        tree = yaml.compose(text)
        held = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(tree, yaml.MappingNode):
        # The loader would keep the last of two and say nothing.
        refuse_doubled(key.value for key, _ in tree.value)
    if not isinstance(held, Mapping | list):
        raise UserError(f"{path} must hold `name: instruction` lines, or a list of names")
    return held


def with_instruction(prompt: Any, instruction: str) -> Any:
    """A prompt (text, or chat messages) that carries an instruction.

    Raises:
        UserError: messages of which none is a user's text.
    """
    if not instruction:
        return prompt
    # An example may end with its own line break.
    space = "" if instruction[-1].isspace() else " "
    if isinstance(prompt, str):
        return f"{instruction}{space}{prompt}"
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not users or not isinstance(prompt[users[-1]]["content"], str):
        raise UserError(
            f"the prompt {str(prompt)[:60]!r} has no user's message of text, which is where a "
            "mode's instruction goes; give one"
        )
    last = dict(prompt[users[-1]])
    last["content"] = f"{last['content']} {instruction}"
    return [*prompt[: users[-1]], last, *prompt[users[-1] + 1 :]]
