"""The most memory that a call holds beyond what was there before it.

On a CPU: the process's resident high-water mark (VmHWM, reset before) less what was resident; Linux
only. On a GPU: torch's allocator. Both include what the call returns, gradients among it.
"""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def extra_mb(call: Callable[[], object], device: str = "cpu") -> float | None:
    """In MiB; None where it cannot be measured."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        call()
        return None
    # Memory that malloc keeps for itself would hide what the call takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mb("VmRSS")
    call()
    return status_mb("VmHWM") - before
