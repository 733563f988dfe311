"""SIGTERM and Ctrl-C, kept until the step that is under way is done; the second one is at once.

A signal that the process ignores, as one started with nohup does, stays ignored. Only the main
thread can take signals: elsewhere nothing changes.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within `with`, signals are kept here; afterwards they do what they did before.

    `signal` is the one that came, or None; `after` names what it waits for.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.after = "this step"
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.signal = None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()

    def take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.signal = number
            self.leave("stopped at once")
        self.signal = number
        # A print could be in the middle of another one.
        again = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        os.write(2, f"\nstopping after {self.after}; {again} again stops at once\n".encode())

    def leave_if_asked(self, message: str) -> None:
        """`leave`, if a signal came."""
        if self.signal is not None:
            self.leave(message)

    def leave(self, message: str) -> None:
        """Raise what the signal stands for: KeyboardInterrupt, or SystemExit with status 143."""
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(message)
