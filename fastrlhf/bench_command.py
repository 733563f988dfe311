"""`fastrlhf bench`: the benchmarks of a checkout, run by pytest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .errors import UserError

__all__ = ["run_bench"]


def run_bench(checkout: str | None, options: Sequence[str]) -> int:
    """`pytest bench/` of a checkout; the exit status is pytest's, 2 for a bad option."""
    here = Path(__file__).parent.parent
    places = [Path(checkout)] if checkout else [here, Path.cwd()]
    roots = [place for place in places if (place / "bench" / "test_ops.py").exists()]
    if not roots:
        raise UserError(
            f"no benchmarks in {' or '.join(str(place) for place in places)}: they are in the "
            "source, not in the installed package. Get the source of fastrlhf and name its folder: "
            "fastrlhf bench --checkout PATH"
        )
    if not (find_spec("pytest") and find_spec("pytest_benchmark")):
        raise UserError(
            "fastrlhf bench needs pytest and pytest-benchmark; "
            "run: pip install pytest pytest-benchmark"
        )
    # -P keeps the current folder off Python's path, where kernels/ would pass for a package.
    command = [sys.executable, "-P", "-m", "pytest", str(roots[0] / "bench"), "--benchmark-quiet"]
    try:
        status = subprocess.run([*command, *options]).returncode
    except KeyboardInterrupt:
        print("fastrlhf: interrupted; the rows so far are kept", file=sys.stderr)
        return 130
    bad_option = 4  # pytest's ExitCode.USAGE_ERROR
    return 2 if status == bad_option else status
