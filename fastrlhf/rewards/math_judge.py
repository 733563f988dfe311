"""Whether two texts are equal as mathematics, judged by math-verify in a process of its own.

Simplifying what a model wrote can take for ever (`9^{9^{9^{9}}}`), often within a single operation
that no signal ends. A process can be ended: after `SECONDS` the texts count as not equal, and the
next question starts another one. math-verify's own time-outs work in a main thread alone.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial

from ..errors import UserError
from .remote import in_thread

__all__ = ["MathJudge", "serve"]

SECONDS = 5.0
STARTING = 120.0


class MathJudge:
    """Asks a process of its own, which is started with the first question."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()
        atexit.register(self.end)

    def equal(self, truth: str, text: str) -> bool:
        """Whether what ``text`` answers equals ``truth``; not where that takes too long."""
        with self.lock:
            if self.process is None:
                self.begin()
            answer = ""
            try:
                answer = in_thread(partial(self.ask, json.dumps([truth, text])), SECONDS)
            except OSError:
                pass  # late, or the process has died: then it has not said that they are equal
            finally:
                # An answer that comes later would pass for the next one's.
                if not answer:
                    self.end()
            return answer.strip() == "1"

    def ask(self, question: str) -> str:
        assert self.process and self.process.stdin and self.process.stdout
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def begin(self) -> None:
        """Start the process.

        Raises:
            UserError: it does not start.
        """
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            # It finds the same modules.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout
        try:
            started = in_thread(self.process.stdout.readline, STARTING)
        except TimeoutError:
            started = ""
        if not started:
            self.end()
            raise UserError("math-verify does not start; see that `import math_verify` works")

    def end(self) -> None:
        """End the process; the next question starts another."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # of a question that it did not read
                    pipe.close()


def serve() -> None:
    """Answer the questions of standard input, a line each, until it ends."""
    from math_verify import parse, verify

    # Ctrl-C is for the run, which ends its step first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr

    def equal(truth: str, text: str) -> bool:
        gold = parse(f"${truth}$", parsing_timeout=None)
        given = parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
        return verify(gold, given, timeout_seconds=None)

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        # Where the asker has been killed, this ends too.
        if hasattr(signal, "alarm"):
            signal.alarm(round(2 * SECONDS))
        try:
            found = equal(*json.loads(line))
        except Exception:  # whatever a text brings math-verify to raise, it is no right answer
            found = False
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print(int(found), file=answers, flush=True)
