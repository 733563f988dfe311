"""Steps in turns: each side is a process that waits to be told before each of its steps.

So what is compared was measured within seconds of each other, and all sides have all cores while it
is their turn. A side reads one line before each step and writes one line of JSON after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def status_mb(field: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


class Gate:
    """A side's end of the line; its arguments are the last of the command line."""

    def __init__(self) -> None:
        self.orders = os.fdopen(int(sys.argv[-2]), "r")
        self.results = os.fdopen(int(sys.argv[-1]), "w")
        self.imported_mb = status_mb("VmRSS")
        self.begun = self.cpu = 0.0

    def wait(self) -> None:
        """Until this side's turn; the process ends where there is none any more."""
        if not self.orders.readline():
            os._exit(0)
        self.begun, self.cpu = time.perf_counter(), time.process_time()

    def done(self, score: float, phases: Mapping[str, float]) -> None:
        """A step has ended. score: the rollout's mean. phases: seconds of its parts."""
        said = {
            "seconds": time.perf_counter() - self.begun,
            "cpu_seconds": time.process_time() - self.cpu,
            "score": score,
            "phases": dict(phases),
            "peak_mb": status_mb("VmHWM"),
            "imported_mb": self.imported_mb,
        }
        print(json.dumps(said), file=self.results, flush=True)


class Side:
    """The driver's end: a process with one trainer."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ):
        self.name, self.log = name, log
        order_read, order_write = os.pipe()
        result_read, result_write = os.pipe()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, str(order_read), str(result_write)],
                pass_fds=(order_read, result_write),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
            )
        os.close(order_read)
        os.close(result_write)
        self.orders = os.fdopen(order_write, "w")
        self.results = os.fdopen(result_read, "r")
        self.steps: list[dict[str, Any]] = []

    def step(self) -> dict[str, Any]:
        """Let it take one step."""
        # One that has ended reads no orders; what it said is told below.
        with contextlib.suppress(BrokenPipeError):
            print("go", file=self.orders, flush=True)
        line = self.results.readline()
        if not line:
            said = self.log.read_text()[-3000:]
            raise RuntimeError(f"{self.name} ended before its step did; it said:\n{said}")
        self.steps.append(json.loads(line))
        return self.steps[-1]

    def close(self) -> None:
        """End the process, wherever it is."""
        with contextlib.suppress(BrokenPipeError):
            self.orders.close()
        self.results.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
