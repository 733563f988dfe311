"""Freed memory in processes of their own: what malloc is told holds for a whole process."""

import os
import subprocess
import sys

import pytest

from fastrlhf import PPOConfig
from fastrlhf.host_memory import spares_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="malloc is glibc's on Linux alone")

# Blocks freed while small ones between them are alive: the heap keeps them.
KEPT = """
import torch
from fastrlhf.host_memory import map_large_blocks
from fastrlhf.metrics import status_bytes
for _ in range(3):  # malloc adapts to blocks of this size
    del_me = torch.ones(2**20)
    del del_me
print(map_large_blocks()) if {maps} else print(None)
start = status_bytes("VmRSS")
blocks = [(torch.ones(2**16), torch.ones(2**10)) for _ in range(256)]
small = [x for _, x in blocks]
del blocks
print(status_bytes("VmRSS") - start)
"""


def kept(maps: bool, **environment: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", KEPT.format(maps=maps)], env=clean | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told, size = done.stdout.split()
    return told, int(size)


@linux
def test_freed_blocks_go_back_at_once_where_asked_for():
    assert kept(False)[1] > 32 * 2**20
    told, size = kept(True)
    assert told == "True"
    assert size < 8 * 2**20


@linux
@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_MMAP_THRESHOLD_": "33554432"},
        {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.mmap_threshold=33554432"},
    ],
)
def test_what_the_environment_says_of_malloc_is_left_alone(environment):
    assert kept(True, **environment)[0] == "False"


def test_who_pays_time_for_memory_pays_this_too():
    assert not spares_memory(PPOConfig())
    assert spares_memory(PPOConfig(quantization="nf4"))
    assert spares_memory(PPOConfig(use_peft=False, optimizer_in_backward=True, batch_size=1))
