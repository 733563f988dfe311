"""A linear map of a few rows, which a decoding step is made of: `F.linear` where nothing is faster.

Vendors' products are made for many rows. At 12 to 64 of them, in float32 on a CPU with AVX-512, a
kernel that lets each lane be a row reads the weight once, where it lies. The weight may be bfloat16
beside rows that are not, as a head whose logits are not rounded; of both, vendors' are faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cpu

# With fewer rows most lanes are empty; a shallow product is over before the kernel has begun.
LEAST_ROWS, LEAST_DEPTH = 12, 64


def fits_few_rows(rows: Tensor, weight: Tensor) -> bool:
    """Whether the kernel multiplies [n, D] with a weight [V, D], and is faster."""
    enough = rows.shape[0] >= LEAST_ROWS and rows.shape[1] >= LEAST_DEPTH
    return enough and _cpu.multiplies_few_rows(rows, weight)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, without gradient: [..., D], [V, D], [V] -> [..., V].

    Sums are in another order than torch's, in float32 where the inputs are. Where `fits_few_rows`,
    x may be float32 beside a weight in bfloat16.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not fits_few_rows(rows, weight):
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
    wide = weight.dtype == down.dtype == up.dtype == torch.float32 and up.is_contiguous()
    if not (wide and fits_few_rows(rows, weight) and fits_few_rows(rows, down)):
        low = F.linear(F.linear(x.to(down.dtype), down), up)
        return few_rows_linear(x, weight, bias).add_(low, alpha=scale)
    out = _cpu.few_rows_product(rows, weight, bias, _cpu.LowRank(down, up, scale))
    return out.view(*x.shape[:-1], weight.shape[0])
