"""The verbs of the command line as a table: what each is called, takes and does.

A new verb is a row of `VERBS` and a function in commands.py; cli.py makes the parser from the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import commands
from .commands import Given
from .config import describe_settings
from .configs import CONFIGS
from .reward_config import RewardConfig

__all__ = ["VERBS", "Option", "Verb"]


@dataclass(frozen=True)
class Option:
    """An option or a place of a verb; ``more`` is as argparse's `add_argument` has it."""

    name: str
    help: str
    more: Mapping[str, Any]


def option(name: str, help: str, **more: Any) -> Option:
    return Option(name, help, more)


@dataclass(frozen=True)
class Verb:
    """A row of the table."""

    name: str
    help: str  # beside the other verbs
    runs: Callable[[Given], int]  # returns the exit status
    description: str | None = None
    options: tuple[Option, ...] = ()
    rest: Literal["settings", "words"] | None = "settings"
    """What else may stand on the command line: settings, words to hand on, or nothing."""
    epilog: str | None = None
    lists: type[Any] | None = None
    """A configuration whose settings stand in the help, in place of an epilog."""
    has_help: bool = True
    """False: `--help` is one of the words to hand on."""
    interrupted: str = ""
    """What is left of it after Ctrl-C, as a clause that ends a sentence."""

    @property
    def closing(self) -> str | None:
        """What stands below the options in the help."""
        if self.lists is None:
            return self.epilog
        return (
            "Settings, each given as --key value or key=value (what a recipe does not set has the "
            f"default shown):\n{describe_settings(self.lists)}"
        )


RECIPE = option("--config", "sentiment, pareto, or a .yaml file", metavar="RECIPE")
BUDGET = (
    option("--gpu", "the memory of the GPU to fit", metavar="16GB"),
    option("--memory", "the same without a GPU", metavar="8GB"),
)

TRAIN = tuple(
    Verb(
        name,
        f"train a language model with {name.upper()}",
        commands.train,
        f"Train a language model; algorithm: {', '.join(kind.family)}. Prints the summary as one "
        "line of JSON.",
        (
            RECIPE,
            option(
                "--resume", "go on with the run in this folder, or a checkpoint's", metavar="RUN"
            ),
            option(
                "--auto",
                "fit --gpu or --memory: may change microbatch_tokens, gradient_checkpointing, "
                "train_layers and quantization",
                action="store_true",
            ),
            *BUDGET,
        ),
        lists=kind,
        interrupted="; what was written is in the run's folder",
    )
    for name, kind in CONFIGS.items()
)

PLAN = Verb(
    "plan",
    "say what a run will hold in memory, before it runs",
    commands.plan,
    "Print the bytes of each component and the peak of each phase of a run, and, where it does not "
    "fit a budget, which settings to change. Loads no weights. Exit status 1: it does not fit as "
    "it is.",
    (
        RECIPE,
        option(
            "--prompt-length", "tokens of the longest prompt (assumed: 256)", type=int, metavar="N"
        ),
        option("--json", "print the plan as one line of JSON", action="store_true"),
        *BUDGET,
    ),
    epilog="Takes the settings of `fastrlhf ppo`, each as --key value or key=value. The model is a "
    "shipped shape (Qwen2.5-0.5B), a folder, or a config.json.",
)

REWARD = Verb(
    "reward",
    "train a reward model on preferences",
    commands.reward,
    "Train a reward model with Bradley-Terry; its folder is then a reward= of the other verbs. "
    "Prints the summary as one line of JSON.",
    (option("--config", "a .yaml file", metavar="RECIPE"),),
    lists=RewardConfig,
)

PARETO = Verb(
    "pareto",
    "train for two rewards and draw the front between them",
    commands.pareto,
    "Train one policy for each of two rewards, interpolate the two adapters, judge every policy on "
    "the same held-out prompts by both rewards, and draw the front. Prints it as one line of JSON. "
    "What was broken off goes on where the same command is given again.",
    (
        RECIPE,
        option(
            "--rewards",
            "two of what reward= takes, like sentiment 'length_band(2, 4)'",
            nargs=2,
            required=True,
            metavar=("A", "B"),
        ),
        option(
            "--points",
            "policies, the two trained ones among them: 5",
            type=int,
            default=5,
            metavar="N",
        ),
        option("--output", "default: runs/pareto", default="runs/pareto", metavar="DIR"),
    ),
    epilog="Takes the settings of the training verbs, each as --key value or key=value, for both "
    "trainings.",
    interrupted="; the same command goes on with it",
)

EVAL = Verb(
    "eval",
    "judge a run's policy, or a model, beside its reference",
    commands.evaluate,
    "Let a policy and its reference answer the same prompts with the same seeds, and print win "
    "rate, scores and KL with 95 % intervals, and answers side by side.",
    (
        option("policy", "a run's folder, or a model", metavar="RUN|MODEL"),
        option("--reference", "what a model is compared with", metavar="MODEL"),
        option("--checkpoint", "of the run: best, else final", metavar="NAME"),
        option("--dataset", "default: what the run held out", metavar="DATA"),
        option(
            "--reward",
            "sentiment, or file.py:function; may be given again. Default: the run's",
            action="append",
            default=[],
            dest="rewards",
            metavar="REWARD",
        ),
        *(
            option(f"--{name}", "default: the run's", type=int, metavar="N")
            for name in ("prompts", "seed", "response-length")
        ),
        option("--samples", "side by side: 4", type=int, default=4, metavar="N"),
        option("--json", "print one line of JSON", action="store_true"),
    ),
    rest=None,
)

PLOT = Verb(
    "plot",
    "draw runs into one picture",
    commands.plot,
    "Draw the curves of one run, or of several in one picture, also of runs under way. Prints the "
    "picture's path.",
    (
        option("runs", "a run's folder, like runs/ppo", nargs="+", metavar="RUN"),
        option(
            "--output",
            "default: plot.png in the run's folder; of several runs, comparison.png",
            metavar="FILE.png",
        ),
    ),
    rest=None,
)

REPORT = Verb(
    "report",
    "write a run as one page of HTML",
    commands.report,
    "Write one page of HTML with a run's figures, curves, findings of the hacking monitor, samples "
    "along the run and settings. Prints the page's path.",
    (
        option("run", "a run's folder, like runs/ppo", metavar="RUN"),
        option("--output", "default: report.html in the folder", metavar="FILE.html"),
    ),
    rest=None,
)

BENCH = Verb(
    "bench",
    "measure the ops against their peers",
    commands.bench,
    "Measure every op against its peers and its floor, in turns. Prints the rows as they come and "
    "keeps them under bench/results/. Needs a checkout of the source.",
    (option("--checkout", "default: where this package lies, or .", metavar="PATH"),),
    rest="words",
    epilog="Handed on to pytest: --quick (minutes), --must-show (the shapes that the aims name), "
    "--op NAME, --shape NAME, --tokens N, --without CANDIDATE, --device cpu|cuda, --results FILE, "
    "and any option of pytest and pytest-benchmark.",
)

EXPORT = Verb(
    "export",
    "write a run's policy as one plain model",
    commands.export,
    "Write the policy, adapters merged, as a folder that transformers loads.",
    (
        option("run", "the run's folder", metavar="RUN"),
        option("--checkpoint", "final (default), best, step-000010", metavar="NAME"),
        option("--output", "a folder to be made", metavar="DIR", required=True),
    ),
    rest=None,
)

XRAY = Verb(
    "xray",
    "what the kernels compile to, without a GPU",
    commands.xray,
    rest="words",
    has_help=False,
)

VERBS = {
    verb.name: verb
    for verb in (*TRAIN, PLAN, REWARD, PARETO, EVAL, PLOT, REPORT, BENCH, EXPORT, XRAY)
}
