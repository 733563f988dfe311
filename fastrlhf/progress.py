"""What a person watches: a bar with the phase and its time; plain lines without a terminal."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .evaluation import Evaluation

__all__ = ["Display"]


class PhaseColumn(ProgressColumn):
    """The phase that runs now and for how long it has."""

    max_refresh = 0.1

    def render(self, task: Task) -> Text:
        phase = task.fields["phase"]
        if not phase:
            return Text("")
        return Text(f"{phase:<8} {time.perf_counter() - task.fields['begun']:5.1f}s", style="cyan")


class Display:
    """Shows a run on standard error, so that standard output carries results alone."""

    def __init__(self, steps: int):
        self.console = Console(stderr=True, highlight=False)
        self.steps = steps
        self.begun = time.perf_counter()
        self.progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=12),
            PhaseColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, phase="", begun=0.0, figures="")

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def phase(self, name: str) -> None:
        """A phase begins."""
        self.progress.update(self.task, phase=name, begun=time.perf_counter())

    def begin_at(self, number: int) -> None:
        """So many steps are done already."""
        self.progress.update(self.task, completed=number)

    def step(self, number: int, line: Mapping[str, Any]) -> None:
        """A step has ended with the metrics ``line``."""
        score = line["objective/scores"]
        # Without a reference there is none.
        kl = line.get("objective/kl")
        # Short enough for the bar's line in a terminal of 80 columns.
        short = f"score {score:+.2f}" + ("" if kl is None else f" KL {kl:.1f}")
        self.progress.update(self.task, completed=number, figures=short)
        if not self.console.is_terminal:
            times = " ".join(
                f"{key.removeprefix('time/')} {value:.1f}s"
                for key, value in line.items()
                if key.startswith("time/")
            )
            elapsed = time.perf_counter() - self.begun
            # Where every optimizer step was skipped, nothing was clipped.
            clipped = line.get("policy/clipfrac")
            figures = (
                f"score {score:+.3f} · "
                + ("" if kl is None else f"KL {kl:.2f} · ")
                + f"entropy {line['objective/entropy']:.2f} · "
                + ("no step taken" if clipped is None else f"clipped {clipped:.1%}")
            )
            print(
                f"step {number}/{self.steps} · {figures} · {times} · {elapsed:.0f}s",
                file=sys.stderr,
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def evaluated(self, title: str, evaluation: Evaluation, count: int | None) -> None:
        """Print an evaluation's figures and its first ``count`` completions with their scores.

        None is the figures alone, in one line among those of the steps.
        """
        kl = "" if evaluation.kl is None else f"KL {evaluation.kl:.2f}, "
        above = "" if count is None else "\n"
        figures = f"score {evaluation.score:+.3f}, {kl}entropy {evaluation.entropy:.2f}"
        self.say(f"{above}{title}: {figures}")
        shown = zip(evaluation.scores, evaluation.prompts, evaluation.completions, strict=True)
        for score, prompt, completion in itertools.islice(shown, count or 0):
            judged = "  n/a" if score is None else f"{score:+.2f}"
            self.say(f"  {judged}  {prompt} | {' '.join(completion.split())}")
