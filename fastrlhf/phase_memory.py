"""The most memory that each phase of a run has held: on a GPU in tensors, else in the process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .host_memory import return_freed_memory

__all__ = ["PhaseMemory", "status_bytes"]


class PhaseMemory:
    """The most bytes that each phase has held so far, `peaks`; empty where no system tells.

    On a GPU: tensors, as torch's allocator counts them. On a CPU: the process's resident size
    beyond what it was when this was made, imports and all; Linux only. The system's own high-water
    mark is reset at the start of each phase, so `highest` keeps that of the whole process.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.start = 0 if self.on_gpu else status_bytes("VmRSS")
        self.highest = 0
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        resettable = self.restart()
        try:
            yield
        finally:
            if resettable:
                peak = torch.cuda.max_memory_allocated() if self.on_gpu else status_bytes("VmHWM")
                self.peaks[phase] = max(self.peaks.get(phase, 0), peak - self.start)

    def restart(self) -> bool:
        """Forget the high-water mark, but for `highest`; False where it cannot be forgotten."""
        self.highest = max(self.highest, resident_peak())
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return True
        # What malloc keeps from the phase before would pass for this one's.
        return_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def peak_mb(self) -> float:
        """The most memory that this process has had resident, in MiB."""
        self.highest = max(self.highest, resident_peak())
        return self.highest / 2**20


def status_bytes(field: str) -> int:
    """What Linux says of this process's memory (VmRSS, VmHWM); 0 elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def resident_peak() -> int:
    """The most bytes that this process has had resident since the mark was last reset."""
    if peak := status_bytes("VmHWM"):
        return peak
    import resource

    # macOS counts bytes; other systems without /proc count KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
