"""Problems and measures that the kernel tests share."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

# Read when torch loads OpenMP: threads that wait sleep instead of spinning. Small problems on a
# busy machine are otherwise some 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import Tensor

# Read when Triton's kernels are defined: without a GPU they run under its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass(frozen=True)
class HeadProblem:
    """A head, a reference and a rollout; float64 unless converted."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    ref_hidden: Tensor  # [N, D]
    ref_weight: Tensor  # [V, D]
    ref_bias: Tensor  # [V]
    old_logprobs: Tensor  # [N]
    advantages: Tensor  # [N]
    targets: Tensor  # [N]
    mask: Tensor  # [N]

    def to(self, dtype: torch.dtype) -> "HeadProblem":
        given = {x.name: getattr(self, x.name) for x in fields(self)}
        return replace(
            self, **{k: x.to(dtype) for k, x in given.items() if x.dtype.is_floating_point}
        )

    def rows(self, index: Tensor | slice) -> "HeadProblem":
        names = ("hidden", "ref_hidden", "old_logprobs", "advantages", "targets", "mask")
        return replace(self, **{name: getattr(self, name)[index] for name in names})


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels are tested."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def head_problem() -> Callable[..., HeadProblem]:
    def make(n: int = 13, d: int = 16, v: int = 1003, *, seed: int = 0, scale: float = 0.4):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden, weight, bias = normal(n, d), scale * normal(v, d), 0.1 * normal(v)
        targets = torch.randint(0, v, (n,), generator=generator)
        logprobs = (hidden @ weight.T + bias).log_softmax(-1)
        picked = logprobs.gather(-1, targets[:, None]).squeeze(-1)
        mask = torch.arange(n) % 4 != 1
        return HeadProblem(
            hidden, weight, bias, hidden + 0.2 * normal(n, d), weight + 0.02 * normal(v, d),
            bias + 0.1 * normal(v), picked + 0.2 * normal(n), normal(n), targets, mask,
        )  # fmt: skip

    return make


@pytest.fixture
def relative_rms() -> Callable[[Tensor, Tensor], float]:
    """‖got − truth‖ / ‖truth‖ over a whole tensor."""

    def measure(got: Tensor, truth: Tensor) -> float:
        assert got.shape == truth.shape
        got, truth = got.detach(), truth.detach().double()
        return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-12))

    return measure
