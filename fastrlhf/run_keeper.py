"""A run from its first moment to its last: begun or resumed, kept while it goes on, left cleanly.

Within `with keeper`, SIGTERM and Ctrl-C wait until the step is done and a checkpoint is written.
During the last evaluation they wait for its end and leave a checkpoint of the moment before it:
whoever resumes evaluates, and that is all. Whatever else breaks the block off, the weights are
saved as `interrupted`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .callbacks import Callbacks
from .config import PPOConfig
from .errors import UserError
from .evaluation import Evaluation
from .kept_settings import run_of
from .metrics import PhaseTimer, RunFolder
from .progress import Display
from .resume import resume
from .run_checkpoints import Checkpoints, resume_command
from .run_end import RunEnd
from .run_files import read_given
from .run_state import RunState
from .stop_request import StopRequest

__all__ = ["RunKeeper"]


class RunKeeper:
    """Keeps one run.

    Args:
        run: what changes in it.
        identity: of its model and data.
        name: of the run.
        started: `time.perf_counter()` from which its seconds count.
    """

    def __init__(
        self,
        folder: RunFolder,
        run: RunState,
        config: PPOConfig,
        display: Display,
        timer: PhaseTimer,
        callbacks: Callbacks,
        identity: Mapping[str, str],
        name: str,
        started: float,
    ):
        self.folder = folder
        self.config = config
        self.display = display
        self.timer = timer
        self.callbacks = callbacks
        self.identity = identity
        self.name = name
        self.started = started
        self.stop = StopRequest()
        self.checkpoints = Checkpoints(folder, run, config, self.facts, display.say)
        self.saved = 0  # the step after which the last checkpoint was written
        self.end = RunEnd(config, display.say)
        self.is_trained = False
        self.moment: Mapping[str, Any] | None = None  # when training was done
        run.others |= {"seconds": timer, "callbacks": callbacks, "end": self.end}

    @property
    def seconds(self) -> float:
        """Since the run was started, without what a killed process did in vain."""
        return time.perf_counter() - self.started

    def facts(self) -> dict[str, Any]:
        return {"identity": self.identity, "name": self.name, "seconds": self.seconds}

    def begin(self, chosen: bool | str | Path | None) -> int:
        """Make the run's folder, or go on with the one there; how many rollouts are done.

        Args:
            chosen: True, a run's folder or a checkpoint's to go on; else a run begins.

        Raises:
            UserError: a folder that holds a run, or none to go on with; one that is under way; no
                room on the disk.
        """
        try:
            return self.opened(chosen)
        except BaseException:
            self.folder.lock.release()
            raise

    def opened(self, chosen: bool | str | Path | None) -> int:
        done = 0
        self.is_trained, self.moment = False, None
        if chosen:
            if chosen is not True:
                self.folder.path = run_of(chosen)
            self.refuse_less()
            self.folder.hold()
            resumed = resume(self.checkpoints, chosen, self.identity, self.display.say)
            done = self.saved = resumed.step
            self.name = resumed.facts.get("name", self.name)
            self.started -= resumed.facts.get("seconds", 0.0)
            self.display.begin_at(done)
        else:
            self.folder.make()
        self.checkpoints.check_room()
        self.folder.write_text("config.yaml", self.config.to_yaml())
        self.folder.write_text("given.json", json.dumps(self.folder.given) + "\n")
        return done

    def refuse_less(self) -> None:
        """Raise UserError where the run was given from Python what this one takes from settings."""
        kept, ours = read_given(self.folder.path), self.folder.given
        for name in (name for name, value in kept.items() if value is not None):
            if ours.get(name) is None:
                raise UserError(
                    f"the run in {self.folder.path} was given its {name.replace('_', ' ')} from "
                    "Python, and its settings name another; go on with it there, with the same "
                    f"arguments: train(resume_from_checkpoint={str(self.folder.path)!r})"
                )

    def step_done(self, number: int) -> None:
        """Save where it is time to, and leave where a signal asked for that."""
        every, asked = self.config.save_steps, self.stop.signal
        # What ended a run may be of a kind that would not end it again.
        due = every and (number % every == 0 or self.end.reason is not None)
        if self.callbacks.control.should_save or asked or due:
            self.save(number)
        if asked:
            self.leave(number)

    def save(self, number: int) -> None:
        with self.timer("save"):
            written = self.checkpoints.save(number, self.moment)
        self.timer.take_step()
        if written:
            self.saved = number
            self.callbacks("on_save")

    def leave(self, number: int) -> None:
        again = resume_command(self.config, self.folder.path, self.folder.given)
        self.display.say(f"stopped after step {number}; go on with: {again}")
        self.stop.leave(f"after step {number}")

    def training_done(self, number: int) -> None:
        """After ``number`` rollouts only the last evaluation is left, which changes no weight."""
        self.is_trained = True
        self.stop.after = "the last evaluation"
        # What cannot be kept is told where it would have to be written.
        with suppress(UserError):
            self.moment = self.checkpoints.moment(number)

    def heed_signal(self, step: int) -> None:
        """Leave if a signal came in the last evaluation, of which nothing is kept yet.

        Whoever resumes does it again.
        """
        if self.is_trained and self.stop.signal is not None:
            if self.saved != step:
                self.save(step)
            self.leave(step)

    def evaluated(self, result: Evaluation, step: int) -> None:
        """The policy after ``step`` rollouts was judged on the held-out prompts."""
        self.heed_signal(step)
        figures = {k: getattr(result, k) for k in ("score", "kl", "entropy", "distinct_2")}
        self.folder.append("evaluations.jsonl", {"step": step} | figures)
        self.callbacks("on_evaluate", metrics=figures)
        samples = zip(result.prompts, result.completions, result.scores, strict=True)
        for told, sample in zip(result.told, samples, strict=True):
            record = dict(zip(("prompt", "completion", "score"), sample, strict=True))
            self.folder.append("samples.jsonl", {"step": step, **record, **told})
        score, state = result.score, self.callbacks.state
        if step and (state.best_metric is None or score > state.best_metric):
            state.best_metric, state.best_global_step = score, step
            if self.config.save_best:
                with self.timer("save"):
                    self.checkpoints.save_best(score, step)
                self.timer.take_step()
                state.best_model_checkpoint = str(self.checkpoints.path / "best")

    def __enter__(self) -> RunKeeper:
        self.stop.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Where a signal waited for the step's end, a checkpoint of this very moment is there.
        waited = self.stop.signal is not None and self.saved == self.callbacks.state.global_step
        if error is not None and not waited:
            self.checkpoints.save_interrupted()
        self.folder.lock.release()
        self.stop.__exit__()
