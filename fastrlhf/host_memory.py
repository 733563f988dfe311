"""Freed host memory goes back to the system: at once for runs that pay time for memory.

glibc's malloc keeps what is freed for the next block that fits, which saves the page faults of new
memory. What does not fit is taken anew, and peaks grow by what lies unused: an ordinary run on a
CPU holds some percent more than its tensors, most of it in the update. From `map_large_blocks` on
each larger block is mapped on its own and goes back when it is freed; the peak is then what is
alive, and page faults make the update slower.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import PPOConfig

__all__ = ["map_large_blocks", "return_freed_memory", "spares_memory"]

LARGE = 128 * 1024
"""bytes; where glibc starts before it adapts"""
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ASKED = ("MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold")


def spares_memory(config: PPOConfig) -> bool:
    """Whether the settings pay time for memory already."""
    return config.quantization is not None or config.optimizer_in_backward


def map_large_blocks() -> bool:
    """From now on, give every freed block of 128 KiB and more back at once, in this process.

    False where malloc is not glibc's, or where the environment says what it is to do.
    """
    given = (*os.environ, *os.environ.get("GLIBC_TUNABLES", "").replace("=", ":").split(":"))
    if sys.platform != "linux" or any(name in given for name in ASKED):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Other systems' C libraries for Linux have a mallopt that does nothing and returns 0.
    return mallopt is not None and all(
        mallopt(what, LARGE) for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    )


def return_freed_memory() -> None:
    """Give what malloc keeps back to the system, where it is glibc's.

    In full training of a 135M model it is most of a byte a parameter, both when the head's float32
    sums are made in the forward and when they become a gradient in the backward.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
