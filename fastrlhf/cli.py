"""The command line: `fastrlhf ppo --config sentiment key=value`, `fastrlhf bench --quick`.

Its verbs are the rows of verbs.py. Every setting of a verb's configuration is a flag
(`--kl-coef 0.1`) and a pair (`kl_coef=0.1`). Results go to standard output, everything else to
standard error; a bad input is one sentence there and exit status 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence

from .commands import Given
from .errors import SelfCheckError, UserError
from .verbs import VERBS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    started = time.perf_counter()
    # OpenMP's threads wait for each other by spinning, by default for so long that beside a second
    # busy program a run all but stands still (bench/NOTES.md). Read when torch loads the library.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments, rest = make_parser().parse_known_args(argv)
    quieten()
    try:
        return VERBS[arguments.verb].runs(given(arguments, rest, started))
    except (UserError, SelfCheckError) as error:
        print(f"fastrlhf: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except SystemExit as stopped:  # SIGTERM, after a checkpoint
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        print(f"fastrlhf: interrupted{VERBS[arguments.verb].interrupted}", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """A parser of all verbs; what it does not know is left over for `given`."""
    parser = argparse.ArgumentParser(
        prog="fastrlhf", description="RLHF for one memory-constrained GPU, or none."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS.values():
        raw = verb.lists is not None
        made = verbs.add_parser(
            verb.name,
            help=verb.help,
            description=verb.description,
            epilog=verb.closing,
            # The settings' list has lines of its own.
            formatter_class=argparse.RawDescriptionHelpFormatter if raw else argparse.HelpFormatter,
            allow_abbrev=False,
            add_help=verb.has_help,
        )
        for option in verb.options:
            made.add_argument(option.name, help=option.help, **option.more)
    return parser


def given(arguments: argparse.Namespace, rest: Sequence[str], started: float) -> Given:
    """What was parsed and what is left over, as the verb takes it."""
    verb = VERBS[arguments.verb]
    if rest and verb.rest is None:
        raise UserError(f"{rest[0]!r} is no option of this verb; see its --help")
    options = argparse.Namespace(**{k: v for k, v in vars(arguments).items() if k != "verb"})
    settings = overrides(rest) if verb.rest == "settings" else []
    return Given(verb.name, options, settings, rest, started)


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


def quieten() -> None:
    """Let warnings be one line each, and leave out those that are not for who trains."""
    warnings.showwarning = show_warning
    # These are for the authors of the packages that we build on.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Our own warnings are for the user to read; where in the code they arise is not."""
    print(f"fastrlhf: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
