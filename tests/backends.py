"""The backends as parameters of a test, each skipped where it cannot run."""

import pytest
import torch

from fastrlhf_kernels import _cpu

cpu_only = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")
CPU = pytest.param("cpu", marks=cpu_only)
TRITON = pytest.param("triton", marks=pytest.mark.interpret)
KERNELS = [CPU, TRITON]
BACKENDS = ["reference", *KERNELS]

# For tests whose tensors are on the CPU; on a GPU those of the Triton kernels' own files run.
INTERPRETED = pytest.param(
    "triton",
    marks=[
        pytest.mark.interpret,
        pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not in use"),
    ],
)
ON_CPU = ["reference", CPU, INTERPRETED]


def place(backend: str, device: torch.device) -> torch.device:
    """Where a backend's tensors live: Triton's on the tested device, every other one's on the CPU.

    A GPU machine tests the C++ kernels too, and those read host memory.
    """
    return device if backend == "triton" else torch.device("cpu")
