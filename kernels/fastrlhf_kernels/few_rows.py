"""A linear map of a few rows, which a decoding step is made of: `F.linear` where nothing is faster.

Vendors' products are made for many rows. At 12 to 64 of them, in float32 on a CPU with AVX-512, a
kernel that lets each lane be a row reads the weight once, where it lies.
"""

import torch.nn.functional as F
from torch import Tensor

from . import _cpu

# With fewer rows most lanes are empty; a shallow product is over before the kernel has begun.
LEAST_ROWS, LEAST_DEPTH = 12, 64


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, without gradient: [..., D], [V, D], [V] -> [..., V].

    Sums are in another order than torch's, in float32 where the inputs are.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not is_few(rows) or not _cpu.multiplies_few_rows(rows, weight):
        return F.linear(x, weight, bias)
    return _cpu.few_rows_product(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def few_rows_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ, without gradient: [..., D] -> [..., V].

    The base's and the adapter's product are one pass over the rows. Elsewhere they are torch's, and
    in the adapter's dtype, as PEFT computes.

    Args:
        weight, bias: W [V, D] and b [V].
        down, up: A [r, D] and B [V, r].
    """
    rows = x.reshape(-1, x.shape[-1])
    taken = all(_cpu.multiplies_few_rows(rows, y) for y in (weight, down, up))
    if not (taken and is_few(rows)):
        low = F.linear(F.linear(x.to(down.dtype), down), up)
        return few_rows_linear(x, weight, bias).add_(low, alpha=scale)
    out = _cpu.few_rows_product(rows, weight, bias, _cpu.LowRank(down, up, scale))
    return out.view(*x.shape[:-1], weight.shape[0])


def is_few(rows: Tensor) -> bool:
    return rows.shape[0] >= LEAST_ROWS and rows.shape[1] >= LEAST_DEPTH
