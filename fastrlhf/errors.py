"""What goes wrong because of an input, said in one sentence that names the fix."""

import difflib
from collections.abc import Iterable

__all__ = ["SelfCheckError", "UserError", "nearest"]


class UserError(ValueError):
    """An input that cannot be used: a key, a file, a model, a reward. The message names the fix.

    The command line prints the message alone and exits with status 2.
    """


class SelfCheckError(RuntimeError):
    """An identity that holds in every correct run did not hold (docs/math.md, section 5.13).

    Training stops: the numbers after it would mean nothing.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of ``known`` was probably meant by ``name``, as a clause to end an error with."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
