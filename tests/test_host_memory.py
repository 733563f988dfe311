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
from fastrlhf.phase_memory import status_bytes
for _ in range(3):  # malloc adapts to blocks of this size
    del_me = torch.ones(2**20)
    del del_me
print(map_large_blocks())
start = status_bytes("VmRSS")
blocks = [(torch.ones(2**16), torch.ones(2**10)) for _ in range(256)]
small = [x for _, x in blocks]
del blocks
print(status_bytes("VmRSS") - start)
"""


def kept(program: str, **environment: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told, size = done.stdout.split()
    return told, int(size)


@linux
def test_freed_blocks_go_back_at_once_where_asked_for():
    assert kept(KEPT.replace("map_large_blocks())", "None)"))[1] > 32 * 2**20
    told, size = kept(KEPT)
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
    assert kept(KEPT, **environment)[0] == "False"


def test_who_pays_time_for_memory_pays_this_too():
    assert not spares_memory(PPOConfig())
    assert spares_memory(PPOConfig(quantization="nf4"))
    assert spares_memory(PPOConfig(use_peft=False, optimizer_in_backward=True, batch_size=1))


# A small block in the place of a freed large one: the next large one is new.
REPLACED = """
import torch
from fastrlhf.host_memory import map_large_blocks
from fastrlhf.phase_memory import status_bytes
{first}
start = status_bytes("VmRSS")
small = []
for _ in range(8):
    large = torch.ones(20 * 2**18)
    small.append(torch.ones(2**17))  # behind it, so that the heap does not end with it
    del large
    small.append(torch.ones(2**18))
print(status_bytes("VmHWM") - start)
"""


@linux
def test_ordinary_runs_have_their_largest_blocks_mapped_alone():
    def peak(first: str) -> int:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", REPLACED.format(first=first)]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
        return int(done.stdout)

    # 20 MB, and 8 of 1.5 MB.
    assert peak("assert map_large_blocks(sparing=False)") < 40 * 2**20 < peak("")


@linux
def test_what_spares_memory_goes_on_sparing_it():
    # A run's backbone is loaded after `--auto --memory` has asked for more.
    then = "print(map_large_blocks() and map_large_blocks(sparing=False))"
    assert kept(KEPT.replace("print(map_large_blocks())", then))[1] < 8 * 2**20
