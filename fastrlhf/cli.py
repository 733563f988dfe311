"""The command line: `fastrlhf ppo --config sentiment key=value`, `fastrlhf bench --quick`.

Every setting of a verb's configuration is a flag (`--kl-coef 0.1`) and a pair (`kl_coef=0.1`).
Results go to standard output, everything else to standard error; a bad input is one sentence there
and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .config import describe_settings, load_config
from .configs import CONFIGS
from .errors import SelfCheckError, UserError
from .kept_settings import resume_config
from .reward_config import RewardConfig

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    started = time.perf_counter()
    # OpenMP's threads wait for each other by spinning, by default for so long that beside a second
    # busy program a run all but stands still (bench/NOTES.md). Read when torch loads the library.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    parser = argparse.ArgumentParser(
        prog="fastrlhf", description="RLHF for one memory-constrained GPU, or none."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_trainers(verbs)
    add_plan(verbs)
    for verb in (*CONFIGS, "plan"):
        budget = verbs.choices[verb]
        budget.add_argument("--gpu", metavar="16GB", help="the memory of the GPU to fit")
        budget.add_argument("--memory", metavar="8GB", help="the same without a GPU")
    add_reward(verbs)
    add_eval(verbs)
    add_plot(verbs)
    add_report(verbs)
    add_bench(verbs)
    add_export(verbs)
    verbs.add_parser("xray", help="what the kernels compile to, without a GPU", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    warnings.showwarning = show_warning
    # What follows is for the authors of the packages that we build on, not for who trains.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if arguments.verb == "xray":
            return show_kernels(rest)
        if arguments.verb == "bench":
            from .bench_command import run_bench

            return run_bench(arguments.checkout, rest)
        if arguments.verb == "export":
            return export(arguments, rest)
        if arguments.verb == "plot":
            return plot(arguments, rest)
        if arguments.verb == "report":
            return report(arguments, rest)
        if arguments.verb == "eval":
            return evaluate(arguments, rest)
        if arguments.verb == "plan":
            return plan_run(arguments, overrides(rest))
        if arguments.verb == "reward":
            return train_reward(arguments.config, overrides(rest), started)
        return train(arguments, overrides(rest), started)
    except (UserError, SelfCheckError) as error:
        print(f"fastrlhf: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except SystemExit as stopped:  # SIGTERM, after a checkpoint
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        kept = "; what was written is in the run's folder" if arguments.verb in CONFIGS else ""
        print(f"fastrlhf: interrupted{kept}", file=sys.stderr)
        return 130


def overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Settings given as `key=value`, `--key=value`, `--key value`, or `--key` for true."""
    pairs = []
    left = list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise UserError(f"{word!r} is not a setting; write key=value or --key value")
            # A bare flag switches on: `--audit`.
            bare = not left or re.match("--|[a-z_]+=", left[0])
            value = "true" if bare else left.pop(0)
        pairs.append((key.replace("-", "_"), value))
    return pairs


def add_trainers(verbs: argparse._SubParsersAction) -> None:
    for verb, kind in CONFIGS.items():
        known_as = ", ".join(kind.family)
        trains = verbs.add_parser(
            verb,
            help=f"train a language model with {verb.upper()}",
            description=f"Train a language model; algorithm: {known_as}. Prints the summary as one "
            "line of JSON.",
            epilog="Settings, each given as --key value or key=value (what a recipe does not set "
            f"has the default shown):\n{describe_settings(kind)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        trains.add_argument("--config", metavar="RECIPE", help="sentiment, or a .yaml file")
        trains.add_argument(
            "--resume", metavar="RUN", help="go on with the run in this folder, or a checkpoint's"
        )
        trains.add_argument(
            "--auto",
            action="store_true",
            help="fit --gpu or --memory: may change microbatch_tokens, gradient_checkpointing, "
            "train_layers and quantization",
        )


def add_plan(verbs: argparse._SubParsersAction) -> None:
    plan = verbs.add_parser(
        "plan",
        help="say what a run will hold in memory, before it runs",
        description="Print the bytes of each component and the peak of each phase of a run, and, "
        "where it does not fit a budget, which settings to change. Loads no weights. Exit status "
        "1: it does not fit as it is.",
        epilog="Takes the settings of `fastrlhf ppo`, each as --key value or key=value. The model "
        "is a shipped shape (Qwen2.5-0.5B), a folder, or a config.json.",
        allow_abbrev=False,
    )
    plan.add_argument("--config", metavar="RECIPE", help="sentiment, or a .yaml file")
    plan.add_argument(
        "--prompt-length", type=int, metavar="N",
        help="tokens of the longest prompt (assumed: 256)",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print the plan as one line of JSON")


def plan_run(arguments: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    config = load_config(arguments.config, settings)
    if arguments.prompt_length is not None and arguments.prompt_length < 1:
        raise UserError("--prompt-length must be at least 1")
    from .plan_command import Budget, show_plan

    budget = Budget(arguments.gpu, arguments.memory)
    return show_plan(config, budget, arguments.prompt_length, as_json=arguments.json)


def add_eval(verbs: argparse._SubParsersAction) -> None:
    judges = verbs.add_parser(
        "eval",
        help="judge a run's policy, or a model, beside its reference",
        description="Let a policy and its reference answer the same prompts with the same seeds, "
        "and print win rate, scores and KL with 95 % intervals, and answers side by side.",
        allow_abbrev=False,
    )
    judges.add_argument("policy", metavar="RUN|MODEL", help="a run's folder, or a model")
    judges.add_argument("--reference", metavar="MODEL", help="what a model is compared with")
    judges.add_argument("--checkpoint", metavar="NAME", help="of the run: best, else final")
    judges.add_argument("--dataset", metavar="DATA", help="default: what the run held out")
    judges.add_argument(
        "--reward", action="append", default=[], dest="rewards", metavar="REWARD",
        help="sentiment, or file.py:function; may be given again. Default: the run's",
    )  # fmt: skip
    for name in ("prompts", "seed", "response-length"):
        judges.add_argument(f"--{name}", type=int, metavar="N", help="default: the run's")
    judges.add_argument("--samples", type=int, default=4, metavar="N", help="side by side: 4")
    judges.add_argument("--json", action="store_true", help="print one line of JSON")


def evaluate(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    nothing_left(rest)
    given = {k: v for k, v in vars(arguments).items() if k not in ("verb", "json", "samples")}
    for name in ("prompts", "seed", "response_length", "samples"):
        least = 0 if name in ("seed", "samples") else 1
        if (value := getattr(arguments, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    from .evaluate_command import Asked, evaluate_command

    return evaluate_command(Asked(**given), as_json=arguments.json, samples=arguments.samples)


def add_plot(verbs: argparse._SubParsersAction) -> None:
    draws = verbs.add_parser(
        "plot",
        help="draw runs into one picture",
        description="Draw the curves of one run, or of several in one picture, also of runs under "
        "way. Prints the picture's path.",
        allow_abbrev=False,
    )
    draws.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, like runs/ppo")
    draws.add_argument(
        "--output", metavar="FILE.png",
        help="default: plot.png in the run's folder; of several runs, comparison.png",
    )  # fmt: skip


def plot(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    nothing_left(rest)
    from .plot import save_plot

    runs = arguments.runs
    own = Path(runs[0]) / "plot.png" if len(runs) == 1 else Path("comparison.png")
    print(save_plot(runs, Path(arguments.output) if arguments.output else own))
    return 0


def add_report(verbs: argparse._SubParsersAction) -> None:
    writes = verbs.add_parser(
        "report",
        help="write a run as one page of HTML",
        description="Write one page of HTML with a run's figures, curves, findings of the hacking "
        "monitor, samples along the run and settings. Prints the page's path.",
        allow_abbrev=False,
    )
    writes.add_argument("run", metavar="RUN", help="a run's folder, like runs/ppo")
    writes.add_argument("--output", metavar="FILE.html", help="default: report.html in the folder")


def report(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    nothing_left(rest)
    from .report import write_report

    print(write_report(arguments.run, Path(arguments.output) if arguments.output else None))
    return 0


def nothing_left(words: Sequence[str]) -> None:
    if words:
        raise UserError(f"{words[0]!r} is no option of this verb; see its --help")


def train(arguments: argparse.Namespace, settings: list[tuple[str, str]], started: float) -> int:
    recipe, resumed = arguments.config, arguments.resume
    if resumed:
        if recipe or arguments.auto:
            raise UserError("--resume reads the run's settings; leave --config and --auto out")
        config = resume_config(resumed, settings, CONFIGS[arguments.verb])
    else:
        config = load_config(recipe, settings, CONFIGS[arguments.verb])
    if (arguments.gpu or arguments.memory) and not arguments.auto:
        raise UserError("--gpu and --memory are for --auto and for `fastrlhf plan`; add --auto")
    # Imported when the settings are known to be good: torch and transformers take seconds.
    from fastrlhf_kernels import VocabTensorError

    from .metrics import RunFolder
    from .trainers import TRAINERS

    name = Path(recipe).stem if recipe else None
    if arguments.auto:
        from .plan_command import Budget, pick

        config, picked = pick(config, Budget(arguments.gpu, arguments.memory))
        print(f"fastrlhf: {picked}", file=sys.stderr)
    if not resumed:
        RunFolder(config.output_dir, name or config.algorithm).refuse_run()
    print(f"fastrlhf: loading {config.model} and {config.dataset}", file=sys.stderr)
    try:
        trainer = TRAINERS[arguments.verb](args=config, name=name, started=started)
        summary = trainer.train(resume_from_checkpoint=resumed)
    except VocabTensorError as error:
        raise SelfCheckError(f"audit: {error}") from error
    print(json.dumps(asdict(summary)))
    return 0


def add_export(verbs: argparse._SubParsersAction) -> None:
    exports = verbs.add_parser(
        "export",
        help="write a run's policy as one plain model",
        description="Write the policy, adapters merged, as a folder that transformers loads.",
        allow_abbrev=False,
    )
    exports.add_argument("run", metavar="RUN", help="the run's folder")
    exports.add_argument("--checkpoint", metavar="NAME", help="final (default), best, step-000010")
    exports.add_argument("--output", metavar="DIR", required=True, help="a folder to be made")


def export(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from .export import export_run

    nothing_left(rest)
    print(export_run(Path(arguments.run), Path(arguments.output), arguments.checkpoint))
    return 0


def add_reward(verbs: argparse._SubParsersAction) -> None:
    reward = verbs.add_parser(
        "reward",
        help="train a reward model on preferences",
        description="Train a reward model with Bradley-Terry; its folder is then a reward= of the "
        "other verbs. Prints the summary as one line of JSON.",
        epilog="Settings, each given as --key value or key=value (what a recipe does not set has "
        f"the default shown):\n{describe_settings(RewardConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    reward.add_argument("--config", metavar="RECIPE", help="a .yaml file")


def train_reward(recipe: str | None, settings: list[tuple[str, str]], started: float) -> int:
    config = load_config(recipe, settings, RewardConfig)
    from .reward_trainer import RewardTrainer

    print(f"fastrlhf: loading {config.model} and {config.dataset}", file=sys.stderr)
    name = Path(recipe).stem if recipe else "reward"
    print(json.dumps(asdict(RewardTrainer(args=config, name=name, started=started).train())))
    return 0


def add_bench(verbs: argparse._SubParsersAction) -> None:
    bench = verbs.add_parser(
        "bench",
        help="measure the ops against their peers",
        description="Measure every op against its peers and its floor, in turns. Prints the rows "
        "as they come and keeps them under bench/results/. Needs a checkout of the source.",
        epilog="Handed on to pytest: --quick (minutes), --must-show (the shapes that the aims "
        "name), --op NAME, --shape NAME, --tokens N, --without CANDIDATE, --device cpu|cuda, "
        "--results FILE, and any option of pytest and pytest-benchmark.",
        allow_abbrev=False,
    )
    bench.add_argument("--checkout", metavar="PATH", help="default: where this package lies, or .")


def show_kernels(words: Sequence[str]) -> int:
    from fastrlhf_kernels import xray

    return xray.main(words)


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Our own warnings are for the user to read; where in the code they arise is not."""
    print(f"fastrlhf: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
