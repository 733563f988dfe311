"""Meta-training: an initialisation from which a few rollouts suffice to learn a new reward.

    for tasks in deal(all tasks):                       # a meta step
        for task in tasks:
            weights <- theta                            # adapter and value head; fresh optimizer
            for prompts in task:                        # inner_steps
                PPOTrainer.step(prompts)                # any algorithm of the table
            direction = theta - weights                 # reptile
                      | gradient of one more rollout    # fomaml
        theta <- OuterStep(mean of the directions)

There is one backbone throughout: tasks take turns on its adapter. Read `MetaTrainer.step`.
Formulas, an example and the reference's part are in docs/meta.md. Deviations from Nichol et al.
2018 and Finn et al. 2017:

1. Tasks are dealt, each once before any comes twice, and not drawn with replacement.
2. An adaptation's optimizer is the run's AdamW from a fresh state, with its first moments.
3. The gradient of `fomaml` is clipped to max_grad_norm for each task before the mean is taken.
4. A task whose adaptation meets a NaN is left out of that meta step, counted and told.

The reference of the KL is the same for all tasks: what the weights were before meta training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from fastrlhf_kernels import PolicyLossSpec

from .algorithm_settings import require
from .backbone import SharedBackbone
from .checkpoint import save_weights
from .config import PPOConfig, checked_class
from .data import PromptSet, load_rows
from .evaluation import Evaluation, evaluate
from .identity import identity
from .loading import tokenized_prompts
from .losses import MinibatchLoss
from .meta_config import MetaConfig, check_length
from .meta_curves import Adaptation, Line, mean_line, mean_of
from .meta_tasks import Task, Tasks, TaskSource, Turn, deal, read_task, read_tasks, unjudged
from .meta_update import GradientRecorder, OuterStep, SkippedTasks, copies, restore
from .trainer import PPOTrainer
from .types import Experience

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["MetaTrainer"]

INNER, CURVES = "adaptations.jsonl", "curves.jsonl"


class Unwatched:
    """In the place of the hacking monitor: a run that begins again has no first rollouts."""

    stops = False

    def observe(self, *given: Any) -> dict[str, float]:
        """Nothing is found."""
        return {}


class MetaTrainer(PPOTrainer):
    """Learns an initialisation of the adapter from which tasks are quick to adapt to.

    Args:
        tasks: a mapping from names to rewards, or a list of them; instead of a reward, a mapping
            with `reward` and `dataset` brings prompts of its own (see `meta_tasks`).
        train_dataset, eval_dataset: the prompts of all other tasks.
        eval_tasks: tasks like these that are not learnt from: how quickly they are adapted to is
            what evaluations tell. None: that of ``tasks``.
        model, args, processing_class, callbacks, peft_config, quantization_config, name, started:
            see `PPOTrainer`; ``args`` is a `MetaConfig`.

    `train` writes the initialisation as an adapter in PEFT's format to `checkpoints/final` of the
    run's folder: `adapter=FOLDER` starts any run from it.

    Raises:
        UserError: fewer than two tasks, two of one name, and whatever `PPOTrainer` refuses.
    """

    config_class: ClassVar[type[PPOConfig]] = MetaConfig
    config: MetaConfig

    def __init__(
        self,
        model: str | SharedBackbone | None = None,
        tasks: Mapping[str, Any] | Sequence[Any] | None = None,
        args: MetaConfig | None = None,
        train_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        *,
        eval_tasks: Mapping[str, Any] | Sequence[Any] | None = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        name: str = "meta",
        started: float | None = None,
    ):
        started = time.perf_counter() if started is None else started
        config = cast(MetaConfig, checked_class(args, MetaConfig, type(self).__name__))
        # What could be wrong with a task is known before weights are loaded.
        rows = load_rows(config.dataset if train_dataset is None else train_dataset)
        columns = {key: value for key, value in rows[0].items() if key != "prompt"}
        sources, held_out = read_tasks(tasks, eval_tasks, config, columns)
        super().__init__(
            model,
            unjudged,
            config,
            rows,
            eval_dataset,
            processing_class,
            callbacks,
            peft_config=peft_config,
            quantization_config=quantization_config,
            name=name,
            started=started,
        )
        self.folder.note_given(model, train_dataset, eval_dataset, True)
        self.tasks = Tasks([self.prepared(source) for source in sources])
        self.eval_tasks = Tasks([self.prepared(source) for source in held_out]) or self.tasks
        self.weights = self.backbone.trainable()
        self.outer = OuterStep(self.weights, self.config)
        self.recorder: GradientRecorder | None = None
        # An adaptation begins with these, whatever came before it.
        fresh = (self.optimizer.state_dict(), self.schedule.state_dict(), self.state.state_dict())
        self.fresh = copy.deepcopy(fresh)
        say, last = self.display.say, self.keeper.checkpoints.told
        self.skipped = self.skipped_tasks = SkippedTasks(self.config, say, last)
        self.monitor = cast(Any, Unwatched())
        self.reward = cast(Any, self.tasks)
        # Between meta steps nothing of an adaptation is left: this is all that changes.
        self.run.optimizer, self.run.schedule = self.outer.optimizer, self.outer.schedule
        for inner in ("algorithm", "monitor", "skipped steps"):
            del self.run.others[inner]
        self.run.others |= {"reward": self.tasks, "skipped tasks": self.skipped}
        prompts = [self.train_prompts, self.held_out]
        own = (task for task in self.tasks if task.train_prompts is not self.train_prompts)
        prompts += [each for task in own for each in (task.train_prompts, task.held_out)]
        self.keeper.identity = identity(self.backbone, prompts)

    def prepared(self, source: TaskSource) -> Task:
        """A task with its prompts tokenised; a reward model is made a role of the backbone."""
        tokenizer = self.callbacks.given["processing_class"]
        source.scorer.share(self.backbone, tokenizer, self.display.say)
        prompts = (self.train_prompts, self.held_out)
        if source.rows is not None:
            prompts = tokenized_prompts(self.backbone, tokenizer, source.rows, None, self.config)
        return Task(source.name, source.scorer, *prompts)

    def batches(self, done: int = 0) -> Iterator[list[Turn]]:  # type: ignore[override]
        """The tasks of each meta step after the first ``done``, with their prompts."""
        done = self.config.meta_steps if self.keeper.end.reason else done
        return islice(deal(self.tasks, self.config), done, None)

    def step(self, number: int, prompts: list[Turn]) -> Line:  # type: ignore[override]
        """One meta step: adapt to each task from where all begin, then move that place.

        Args:
            prompts: the tasks, with the prompts of each rollout.
        """
        start = copies(self.weights)
        rate = self.outer.rate
        directions: list[list[Tensor]] = []
        tried: list[list[Line]] = []
        done = (number - 1) * self.config.meta_batch_size * self.config.task_rollouts
        for turn in prompts:
            try:
                direction, lines = self.learn(turn, start, done)
            finally:
                restore(self.weights, start)
                self.reward = cast(Any, self.tasks)
            done += len(turn.batches)
            if self.skipped_tasks.ended(turn.task.name):
                directions.append(direction)
            tried.append(lines)
            for place, line in enumerate(lines, start=1):
                about = {"meta_step": number, "task": turn.task.name, "inner_step": place}
                self.folder.append(INNER, about | {k: v for k, v in line.items() if k != "step"})
        norm = self.outer(directions) if directions else 0.0
        told = {"meta/lr": rate, "meta/direction_norm": norm} | self.skipped_tasks.metrics()
        episodes = number * self.config.total_episodes // self.config.meta_steps
        return {"step": number, "episode": episodes} | mean_line(tried) | told

    def learn(self, turn: Turn, start: list[Tensor], done: int) -> tuple[list[Tensor], list[Line]]:
        """Adapt to a task; against which direction the initialisation is to move, and metrics.

        ``done``: rollouts of the run so far. The direction of a task that broke off is of no use.
        """
        self.begin(turn.task)
        inner = self.config.inner_steps
        lines = self.adapted(turn.batches[:inner], done)
        if self.config.method == "reptile":
            with torch.no_grad():
                ends = zip(start, self.weights, strict=True)
                return [before - after for before, after in ends], lines
        if self.skipped_tasks.broken is not None:
            return start, lines
        recorder, optimizer = GradientRecorder(self.weights), self.updater.optimizer
        self.recorder = self.updater.optimizer = recorder
        try:
            lines += self.adapted(turn.batches[inner:], done + inner)
        finally:
            self.recorder, self.updater.optimizer = None, optimizer
        return recorder.mean(self.weights, self.config.num_mini_batches), lines

    def begin(self, task: Task) -> None:
        """Let ``task`` be the one that is learnt, as if nothing had been learnt before."""
        optimizer, schedule, state = copy.deepcopy(self.fresh)
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(schedule)
        self.state.load_state_dict(state)
        self.reward = self.sampler.reward = task.scorer
        self.sampler.prompts = task.train_prompts
        self.skipped_tasks.begin()

    def adapted(self, batches: Iterable[PromptSet], done: int) -> list[Line]:
        """Learn from a rollout of each of ``batches``, until something breaks; their metrics."""
        lines = []
        for number, batch in enumerate(batches, start=done + 1):
            lines.append(super().step(number, batch))
            if not all(weight.isfinite().all() for weight in self.weights):
                self.skipped_tasks.skip("a step of finite gradients left weights that are not")
            if self.skipped_tasks.broken is not None:
                break
        return lines

    def epochs(
        self, experience: Experience, minibatches: list[Tensor], spec: PolicyLossSpec
    ) -> list[MinibatchLoss]:
        """`PPOTrainer.epochs`; where gradients are recorded, one pass: no step moves the policy."""
        if self.recorder is None:
            return super().epochs(experience, minibatches, spec)
        losses: list[MinibatchLoss] = []
        for rows in minibatches:
            losses += self.update(experience, rows, spec, first=not losses)
        return losses

    def adapt(
        self,
        task: Any,
        steps: int | None = None,
        *,
        every: int = 1,
        seed: int | None = None,
        save_to: str | Path | None = None,
    ) -> Adaptation:
        """Learn a task from the initialisation as it is now; the initialisation stays.

        Args:
            task: the name of one of `tasks`, or a new one, given like those.
            steps: rollouts to learn from. None: inner_steps.
            every: so many rollouts between evaluations on the task's held-out prompts; they begin
                before the first and end after the last.
            seed: of the prompts' order and the sampling. None: the run's.
            save_to: a new folder for the adapted adapter, in PEFT's format.

        Returns:
            The curve, shorter where a NaN was met: `broken` says of what.

        Raises:
            UserError: a task that cannot be read, no step, more than a linear learning rate is
                made for, or a folder that is there.
        """
        steps = self.config.inner_steps if steps is None else steps
        for what, number in (("steps", steps), ("every", every)):
            require(number >= 1, f"{what} is {number}; give at least 1")
        check_length(self.config, "steps", steps)
        taken = save_to is not None and Path(save_to).exists()
        require(not taken, f"save_to: {save_to} is there already; give a new folder")
        found = self.tasks.find(task) or self.eval_tasks.find(task)
        if found is None:
            found = self.prepared(read_task(task, self.config))
        seed = self.config.seed if seed is None else seed
        with self.set_aside(found, seed):
            made = self.curve(found, steps, every, seed)
            if save_to is not None and made.broken is None:
                save_weights(self.backbone, Path(save_to))
        return made

    def curve(self, task: Task, steps: int, every: int, seed: int) -> Adaptation:
        self.begin(task)
        size = self.config.batch_size // self.config.num_generations
        reached, found = [0], [self.judged(task)]
        # Of the run's first rollout alone it is known that nothing was learnt before.
        for number, batch in enumerate(task.train_prompts.batches(size, steps, seed), start=1):
            self.adapted([batch], number)
            if self.skipped_tasks.broken is not None:
                self.display.say(
                    f"adapting to {task.name!r} broke off: {self.skipped_tasks.broken}"
                )
                return Adaptation(task.name, reached, found, self.skipped_tasks.broken)
            if number % every == 0 or number == steps:
                reached.append(number)
                found.append(self.judged(task))
        return Adaptation(task.name, reached, found)

    def judged(self, task: Task) -> Evaluation:
        with self.timer("evaluate"):
            return evaluate(
                self.engine, self.backbone, task.scorer, task.held_out, self.config, self.budget
            )

    @contextmanager
    def set_aside(self, task: Task, seed: int) -> Iterator[None]:
        """After the block weights, generators and the task's reward are as if it had not been."""
        start, carried = copies(self.weights), copy.deepcopy(task.scorer.state_dict())
        generators = (self.generator, self.shuffler)
        states = [generator.get_state() for generator in generators]
        for generator in generators:
            # No draw of training: neither is the evaluations' (`evaluation.evaluate`).
            generator.manual_seed(seed + 2_000_003)
        try:
            yield
        finally:
            restore(self.weights, start)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            task.scorer.load_state_dict(carried)
            self.reward = cast(Any, self.tasks)
            self.timer.take_step()

    def evaluate(self, when: str, step: int, brief: bool = False) -> Evaluation:
        """Adapt to each of `eval_tasks` from here; the mean of how well they were done then.

        Every curve is told, and a line of curves.jsonl.
        """
        config = self.config
        steps, every = config.eval_adaptation or config.inner_steps, config.eval_every
        made = [self.adapt(task.name, steps, every=every) for task in self.eval_tasks]
        for one in made:
            scores = {"task": one.task, "after": one.steps, "score": one.scores}
            self.folder.append(CURVES, {"step": step} | scores)
            self.display.say(f"task {one.task}: {' '.join(f'{x:+.3f}' for x in one.scores)}")
        result = mean_of({one.task: one.evaluations[-1] for one in made})
        self.keeper.evaluated(result, step)
        title = f"Held-out prompts {when}, after {steps} rollouts of each task"
        self.display.evaluated(title, result, None if brief else self.config.num_samples)
        return result
