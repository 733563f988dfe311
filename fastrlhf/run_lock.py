"""Whether a run is under way in a folder: a lock that the system takes back with the process.

The lock is `flock` on the file `.lock` in the run's folder. However the process ends, kill -9
included, the system releases it; a run that ends by itself removes the file too. Nothing is locked
where there is no `fcntl` (Windows) or the file system refuses.
"""

from __future__ import annotations

import os
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunLock"]

# A process that was killed frees its memory before its files.
PATIENCE = 5.0  # seconds


class RunLock:
    """Of one run; held from `hold` to `release`, or to the end of its `with` block."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.close: Any = None  # closes the descriptor once, and when this object is gone

    def hold(self, folder: Path) -> None:
        """Say that a run is under way in ``folder``; nothing where this lock does already.

        Raises:
            UserError: another run is.
        """
        path = folder / ".lock"
        if fcntl is None or (self.path == path and self.close.alive):
            return
        self.release()
        begun = time.monotonic()
        try:
            while (descriptor := locked(path)) is None:
                if time.monotonic() - begun > PATIENCE:
                    raise UserError(
                        f"a run is under way in {folder}; wait for its end, or stop it with Ctrl-C"
                    )
                time.sleep(0.05)
        except OSError:
            return
        self.path, self.close = path, weakref.finalize(self, os.close, descriptor)
        HELD.add(self)

    def release(self) -> None:
        if self.path is None or not self.close.alive:
            return
        # While it is held nobody else has a lock on a file of this name.
        with suppress(OSError):
            self.path.unlink()
        self.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def locked(path: Path) -> int | None:
    """An open descriptor of ``path`` with the lock; None where another has it.

    Raises:
        OSError: no lock can be had on this file system.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one that had it may have removed the file in between.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


HELD: weakref.WeakSet[RunLock] = weakref.WeakSet()


def let_go() -> None:
    """In a fork: a worker that outlives its run does not keep the run's lock."""
    for lock in list(HELD):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)
