"""The tasks of a meta-training: a reward each, by name, with prompts of its own where it has any.

A task is given as a reward (whatever `RewardScorer` takes), or as a mapping with `reward` and
`dataset`, and `name` in a list. Tasks without prompts of their own share the trainer's. What a
meta step learns from is dealt: every task comes once before any comes twice, and so do the prompts
of each task. It depends on the seed alone, so that a resumed run goes on with the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .data import PromptSet, load_rows
from .errors import UserError, nearest
from .meta_config import MetaConfig
from .rewards.functions import RewardScorer

__all__ = ["Task", "TaskSource", "Tasks", "Turn", "deal", "read_task", "read_tasks", "unjudged"]

FIELDS = ("name", "reward", "dataset")


@dataclass(frozen=True)
class TaskSource:
    """A task as it was given, checked."""

    name: str
    scorer: RewardScorer
    rows: Sequence[Mapping[str, Any]] | None  # prompts of its own; None: the trainer's


@dataclass(frozen=True)
class Task:
    """A task that can be adapted to."""

    name: str
    scorer: RewardScorer
    train_prompts: PromptSet
    held_out: PromptSet


@dataclass(frozen=True)
class Turn:
    """An adaptation that is due: a task, and the prompts of each of its rollouts."""

    task: Task
    batches: Sequence[PromptSet]


class Tasks:
    """The tasks of a run, in their order; what their rewards carry is saved with it."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = tasks

    @property
    def name(self) -> str:
        """All names, as a plot's title has them."""
        return ", ".join(task.name for task in self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def find(self, name: Any) -> Task | None:
        """The task of that name, if there is one."""
        named = (task for task in self.tasks if isinstance(name, str) and task.name == name)
        return next(named, None)

    def state_dict(self) -> dict[str, Any]:
        return {task.name: task.scorer.state_dict() for task in self.tasks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            UserError: it is of other tasks.
        """
        names = [task.name for task in self.tasks]
        if list(state) != names:
            raise UserError(
                f"the checkpoint is of the tasks {', '.join(state)}, not of {', '.join(names)}; "
                "resume with the tasks of the run, in their order"
            )
        for task in self.tasks:
            task.scorer.load_state_dict(state[task.name])


def read_tasks(
    tasks: Any, eval_tasks: Any, config: MetaConfig, columns: Mapping[str, Any] | None = None
) -> tuple[list[TaskSource], list[TaskSource]]:
    """The tasks of a meta-training, and those that it is judged by.

    Args:
        tasks: a mapping from names to tasks, or a list of them.
        eval_tasks: likewise; None or empty: there are none.
        columns: of a row of the trainer's prompts, with which the rewards are called once.

    Raises:
        UserError: fewer than two tasks, two of one name, or one that cannot be read.
    """
    if not tasks:
        raise UserError(
            "there are no tasks to learn from; give tasks={name: reward, …}, at least two"
        )
    read, judging = (read_each(given, config, columns) for given in (tasks, eval_tasks or []))
    names = [task.name for task in (*read, *judging)]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"two tasks are named {doubled[0]!r}; give tasks={{name: reward, …}} with other names"
        )
    if len(read) == 1:
        raise UserError(
            f"one task, {names[0]!r}, leaves nothing to meta-learn; give two or more, or train on "
            "it with PPOTrainer"
        )
    return read, judging


def read_each(
    tasks: Any, config: MetaConfig, columns: Mapping[str, Any] | None
) -> list[TaskSource]:
    if isinstance(tasks, Mapping):
        return [read_task(task, config, columns, name) for name, task in tasks.items()]
    single = isinstance(tasks, str) or callable(tasks)
    return [read_task(task, config, columns) for task in ([tasks] if single else tasks)]


def read_task(
    task: Any,
    config: MetaConfig,
    columns: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> TaskSource:
    """One task; ``name`` wins over its own.

    Raises:
        UserError: no reward, another key than `name`, `reward` and `dataset`, or a reward or data
            set that cannot be read; the task is named.
    """
    given = dict(task) if isinstance(task, Mapping) else {"reward": task}
    name = given.get("name") if name is None else name
    shown = "a task" if name is None else f"task {name!r}"
    if unknown := [key for key in given if key not in FIELDS]:
        raise UserError(f"{shown} has a key {unknown[0]!r}; {nearest(str(unknown[0]), FIELDS)}")
    if given.get("reward") is None:
        raise UserError(f"{shown} has no reward; give {{'reward': …, 'dataset': …}}")
    if name is not None and not (isinstance(name, str) and name):
        raise UserError(f"{shown} has a name that is no text; name it by a word")
    try:
        rows = None if given.get("dataset") is None else load_rows(given["dataset"])
        scorer = RewardScorer(given["reward"], config)
        if rows is not None:
            columns = {key: value for key, value in rows[0].items() if key != "prompt"}
        scorer.probe(["A prompt"], [dict(columns or {})])
    except UserError as error:
        raise UserError(f"{shown}: {error}") from error
    return TaskSource(scorer.name if name is None else name, scorer, rows)


def deal(tasks: Tasks, config: MetaConfig) -> Iterator[list[Turn]]:
    """The turns of each meta step of a run, from its first."""
    size = config.batch_size // config.num_generations
    count = config.meta_steps * config.meta_batch_size * config.task_rollouts
    dealt = {
        task.name: task.train_prompts.batches(size, count, config.seed + index)
        for index, task in enumerate(tasks)
    }
    generator = torch.Generator().manual_seed(config.seed)
    deck: list[Task] = []
    for _ in range(config.meta_steps):
        while len(deck) < config.meta_batch_size:
            order = torch.randperm(len(tasks), generator=generator).tolist()
            deck += [tasks.tasks[i] for i in order]
        turns, deck = deck[: config.meta_batch_size], deck[config.meta_batch_size :]
        yield [
            Turn(task, [next(dealt[task.name]) for _ in range(config.task_rollouts)])
            for task in turns
        ]


def unjudged(completions: Sequence[str], **_: object) -> list[float]:
    """Stands where `PPOTrainer` wants a reward, until the first task takes its turn."""
    return [0.0] * len(completions)
