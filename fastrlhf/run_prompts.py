"""The prompts that a run held out, found again: as it split them, or by its own record of them.

A run draws what it holds out by position, so that the same settings split a data set that has a row
more in quite another way. samples.jsonl has the texts of the evaluation before training: what is
judged as held out are those, wherever in the data they stand now.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .config import PPOConfig
from .data import PromptSet
from .errors import UserError
from .run_files import read_json_lines

__all__ = ["held_out_again", "told_prompts"]


def told_prompts(run: Path) -> list[str]:
    """The texts that the run in ``run`` was evaluated on before training; none if it was not."""
    lines = read_json_lines(run / "samples.jsonl")
    return list(dict.fromkeys(line["prompt"] for line in lines if line["step"] == 0))


def held_out_again(
    run: Path, prompts: PromptSet, trained: PPOConfig, say: Callable[[str], None]
) -> PromptSet:
    """Of all ``prompts`` of a run's data set those that it held out.

    Args:
        trained: the settings that it was trained with, its data set among them.
        say: told where the data set is not what it was.

    Raises:
        UserError: some are not there any more.
    """
    told = told_prompts(run)
    if missing := len(set(told) - set(prompts.texts)):
        raise UserError(
            f"{trained.dataset} has changed since the run in {run}: {missing} of the {len(told)} "
            "prompts that it held out are gone; give --dataset with prompts that it was not "
            "trained on"
        )
    if not told or len(set(prompts.texts)) > trained.eval_prompts:
        split = prompts.split(trained.eval_prompts, trained.seed)[1]
        if not told or list(split.texts) == told:
            return split
    say(f"{trained.dataset} has changed since the run; its own held-out prompts are taken")
    place = {text: i for i, text in reversed(list(enumerate(prompts.texts)))}
    return prompts.take([place[text] for text in told])
