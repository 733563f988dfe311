"""What each verb of the command line does with what it was given.

Each of these prints its result to standard output and returns the exit status. torch and
transformers, which take seconds, are imported when the settings are known to be good.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import load_config, read_recipe
from .configs import CONFIGS, kind_of
from .errors import SelfCheckError, UserError
from .kept_settings import resume_config
from .reward_config import RewardConfig

__all__ = [
    "Given",
    "bench",
    "evaluate",
    "export",
    "pareto",
    "plan",
    "plot",
    "report",
    "reward",
    "train",
    "xray",
]


@dataclass(frozen=True)
class Given:
    """What stood on the command line."""

    verb: str
    options: Any  # the values of the verb's options are its attributes
    settings: Sequence[tuple[str, str]]  # key and value, both as text
    words: Sequence[str]  # what is handed on as it is
    started: float  # `time.perf_counter()` at the process's start


@contextmanager
def audit_told() -> Iterator[None]:
    """Say in one line what the audit of a training has found."""
    from fastrlhf_kernels import VocabTensorError

    try:
        yield
    except VocabTensorError as error:
        raise SelfCheckError(f"audit: {error}") from error


def train(given: Given) -> int:
    """Train a language model, or go on with a run."""
    options, kind = given.options, CONFIGS[given.verb]
    recipe, resumed = options.config, options.resume
    if resumed:
        if recipe or options.auto:
            raise UserError("--resume reads the run's settings; leave --config and --auto out")
        config = resume_config(resumed, given.settings, kind)
    else:
        config = load_config(recipe, given.settings, kind)
    if (options.gpu or options.memory) and not options.auto:
        raise UserError("--gpu and --memory are for --auto and for `fastrlhf plan`; add --auto")
    from .metrics import RunFolder
    from .trainers import TRAINERS

    name = Path(recipe).stem if recipe else None
    if options.auto:
        from .plan_command import Budget, pick

        config, picked = pick(config, Budget(options.gpu, options.memory))
        print(f"fastrlhf: {picked}", file=sys.stderr)
    folder = RunFolder(config.output_dir, name or config.algorithm)
    if resumed:
        # Told before the model is loaded; the trainer holds it for as long as it runs.
        with folder.lock:
            folder.hold()
    else:
        folder.refuse_run()
    print(f"fastrlhf: loading {config.model} and {config.dataset}", file=sys.stderr)
    with audit_told():
        trainer = TRAINERS[given.verb](args=config, name=name, started=given.started)
        summary = trainer.train(resume_from_checkpoint=resumed)
    print(json.dumps(asdict(summary)))
    return 0


def pareto(given: Given) -> int:
    """Train for two rewards and show what lies between."""
    options = given.options
    for name, flag in (("reward", "--rewards"), ("output_dir", "--output")):
        if name in dict(given.settings):
            raise UserError(f"{name} is what {flag} gives here; leave {name} out")
    recipe = options.config
    own = read_recipe(recipe) if recipe else {}
    named = dict(given.settings).get("algorithm", own.get("algorithm"))
    config = load_config(recipe, given.settings, kind_of(named))
    from .pareto import pareto_front

    with audit_told():
        front = pareto_front(config, options.rewards, options.points, options.output)
    print(json.dumps(asdict(front)))
    return 0


def plan(given: Given) -> int:
    """Say what a run will hold in memory."""
    options, config = given.options, load_config(given.options.config, given.settings)
    if options.prompt_length is not None and options.prompt_length < 1:
        raise UserError("--prompt-length must be at least 1")
    from .plan_command import Budget, show_plan

    budget = Budget(options.gpu, options.memory)
    return show_plan(config, budget, options.prompt_length, as_json=options.json)


def reward(given: Given) -> int:
    """Train a reward model."""
    recipe = given.options.config
    config = load_config(recipe, given.settings, RewardConfig)
    from .reward_trainer import RewardTrainer

    print(f"fastrlhf: loading {config.model} and {config.dataset}", file=sys.stderr)
    name = Path(recipe).stem if recipe else "reward"
    trainer = RewardTrainer(args=config, name=name, started=given.started)
    print(json.dumps(asdict(trainer.train())))
    return 0


def evaluate(given: Given) -> int:
    """Judge a policy beside its reference."""
    options = given.options
    for name in ("prompts", "seed", "response_length", "samples"):
        least = 0 if name in ("seed", "samples") else 1
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    from .evaluate_command import Asked, evaluate_command

    asked = {
        name: value for name, value in vars(options).items() if name not in ("json", "samples")
    }
    return evaluate_command(Asked(**asked), as_json=options.json, samples=options.samples)


def plot(given: Given) -> int:
    """Draw runs into one picture."""
    from .plot import save_plot

    runs, output = given.options.runs, given.options.output
    own = Path(runs[0]) / "plot.png" if len(runs) == 1 else Path("comparison.png")
    print(save_plot(runs, Path(output) if output else own))
    return 0


def report(given: Given) -> int:
    """Write a run as one page."""
    from .report import write_report

    run, output = given.options.run, given.options.output
    print(write_report(run, Path(output) if output else None))
    return 0


def bench(given: Given) -> int:
    """Measure the ops."""
    from .bench_command import run_bench

    return run_bench(given.options.checkout, given.words)


def export(given: Given) -> int:
    """Write a run's policy as one plain model."""
    from .export import export_run

    options = given.options
    print(export_run(Path(options.run), Path(options.output), options.checkpoint))
    return 0


def xray(given: Given) -> int:
    """Compile the kernels and say what they hold."""
    from fastrlhf_kernels import xray as kernels

    return kernels.main(given.words)
