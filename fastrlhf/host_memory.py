"""What malloc does with freed host memory: it goes back to the system, at once where that is asked.

glibc's malloc keeps what is freed for the next block that fits, which saves the page faults of new
memory. What does not fit is taken anew, and peaks grow by what lies unused. Worst are the largest
blocks, logits of the head's workspace and gradients of embeddings: a smaller one that is put into
the place of a freed one makes the next large one new. So all runs on a CPU have blocks of 16 MB and
more mapped each on its own, which costs no time that could be measured (bench/NOTES.md). Runs that
pay time for memory have every block of 128 KB and more so: their peak is then what is alive, and
page faults make the update slower.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import PPOConfig

__all__ = ["map_large_blocks", "return_freed_memory", "spares_memory"]

ORDINARY = (16 * 2**20, 64 * 2**20)
SPARING = (128 * 1024, 128 * 1024)
"""bytes of a block that is mapped by itself, and of the heap's free end that goes back"""
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ASKED = ("MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold")

_spares = False


def spares_memory(config: PPOConfig) -> bool:
    """Whether the settings pay time for memory already."""
    return config.quantization is not None or config.optimizer_in_backward


def map_large_blocks(*, sparing: bool = True) -> bool:
    """From now on, give large blocks back when they are freed, in this process.

    sparing: blocks of 128 KiB and more, until the process ends; else of 16 MiB and more.

    False where malloc is not glibc's, or where the environment says what it is to do.
    """
    global _spares
    given = (*os.environ, *os.environ.get("GLIBC_TUNABLES", "").replace("=", ":").split(":"))
    if sys.platform != "linux" or any(name in given for name in ASKED):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    block, end = SPARING if sparing or _spares else ORDINARY
    # Other systems' C libraries for Linux have a mallopt that does nothing and returns 0.
    done = bool(mallopt and mallopt(M_MMAP_THRESHOLD, block) and mallopt(M_TRIM_THRESHOLD, end))
    _spares = _spares or (sparing and done)
    return done


def return_freed_memory() -> None:
    """Give what malloc keeps back to the system, where it is glibc's.

    In full training of a 135M model it is most of a byte a parameter, both when the head's float32
    sums are made in the forward and when they become a gradient in the backward.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
