"""The step of `AdamW8bit` in plain torch: the specification of its other backends.

Every operation is rounded to float32 by itself and in the order written here, and the kernels do
the same ones without contracting them, so that all backends give the same codes and parameters.
The 8-bit maps are those of Dettmers et al. 2022 and bitsandbytes.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""numbers that share one scale"""
DECADES = 7
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@cache
def dynamic_map(signed: bool) -> Tensor:
    """[256] float32 in [−1, 1] or [0, 1], ascending: what each code stands for.

    Decade i of 7 has 2^i values (unsigned: 2^(i+1)) at the middles of equal cells that cover
    [0.1, 1]·10^(i − 6), so numbers are the finer the larger they are; 0 and 1 are codes as well.
    """
    values = [0.0, 1.0]
    for i in range(DECADES):
        cells = 2 ** (i if signed else i + 1)
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32, device="cpu")
        positive = 10 ** (i - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)
        values += positive.tolist() + ((-positive).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


class Piece(NamedTuple):
    """Sizes above `above` have rank floor(min(size·slope + offset, most)) among the codes ≥ 0."""

    above: float
    slope: float
    offset: float
    most: float


@cache
def pieces(signed: bool) -> tuple[Piece, ...]:
    """The nearest code in closed form: one line a decade, and one for 1; float32 numbers."""
    ranked = dynamic_map(signed)[127 if signed else 0 :].tolist()
    lines, first = [], 1
    for i in range(DECADES):
        count = 2 ** (i if signed else i + 1)
        middle = (ranked[first - 1] + ranked[first]) / 2
        slope = count / (0.9 * 10 ** (i - DECADES + 1))
        lines.append(Piece(middle, slope, first - count / 9, first + count - 0.5))
        first += count
    lines.append(Piece((ranked[-2] + ranked[-1]) / 2, 0.0, first, first))
    if not signed:
        # A second moment above 0 stays above 0: at 0 the next step would divide by eps alone.
        lines[0] = lines[0]._replace(above=0.0)
    rounded = torch.tensor(lines, dtype=torch.float32, device="cpu")
    return tuple(Piece(*line) for line in rounded.tolist())


def _blocks(x: Tensor) -> Tensor:
    """[n] as [ceil(n / 256), 256], filled up with 0."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).reshape(-1, BLOCK)


def quantize(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [n] uint8 of float32 x [n], and the scale max |x| of each block, [ceil(n / 256)].

    A block with NaN or an infinity has that scale, so that all of it is read back as NaN. One
    whose scale is subnormal is read back as 0.
    """
    absmax = _blocks(x.abs()).amax(1)
    inverse = torch.where(absmax >= SMALLEST_NORMAL, 1 / absmax, 0)
    size = (_blocks(x.abs()) * inverse[:, None]).reshape(-1)[: x.numel()]
    size = torch.where(size > 0, size, 0)
    lines = pieces(signed)
    rank = torch.where(size > lines[0].above, 1.0, 0.0)
    for line in lines:
        on_line = (size * line.slope + line.offset).clamp(max=line.most)
        rank = torch.where(size > line.above, on_line.clamp(min=1), rank)
    codes = rank.floor().int()
    if signed:
        # −1 is no code: the one nearest to it is the first.
        codes = torch.where(x < 0, 127 - codes.clamp(max=127), 127 + codes)
    return codes.to(torch.uint8), absmax


def dequantize(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """`dynamic_map(signed)[codes] * absmax` of the block, [n] float32."""
    values = dynamic_map(signed).to(codes.device)[codes.int()]
    return (_blocks(values) * absmax[:, None]).reshape(-1)[: codes.numel()]


def _mixed(x: int) -> int:
    """splitmix64's output function."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def rounding_key(seed: int, step: int, number: int) -> int:
    """64 bits that differ for every seed, step and tensor number."""
    key = 0
    for part in (seed, step, number):
        key = _mixed((key + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    return key


def random_bits(key: int, count: int, device: torch.device) -> Tensor:
    """[count] int64 in [0, 2^32): a hash of the key and the element's index alone.

    The index counts modulo 2^32. Two rounds of multiply and xor-shift ("lowbias32"), with half of
    the key before each.
    """
    word = 0xFFFFFFFF
    x = torch.arange(count, device=device) + (key & word) & word
    x = (x ^ x >> 16) * 0x7FEB352D + (key >> 32) & word
    x = (x ^ x >> 15) * 0x846CA68B & word
    return x ^ x >> 16


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 x [n] as bfloat16 above or below it, E[result] = x for bits uniform in [0, 2^32).

    16 random bits are added below the mantissa that stays; the carry rounds up. NaN stays NaN.
    """
    raised = (x.view(torch.int32).long() & 0xFFFFFFFF) + (bits & 0xFFFF) >> 16
    rounded = torch.where(raised >= 0x8000, raised - 0x10000, raised).to(torch.int16)
    return torch.where(x.isnan(), torch.nan, rounded.view(torch.bfloat16))


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of one step for one tensor; all backends round them to float32 alike."""

    beta1: float
    beta2: float
    eps: float
    decay: float
    """1 − lr·weight_decay"""
    step_size: float
    """lr / (1 − beta1^step)"""
    root_correction: float
    """1 / sqrt(1 − beta2^step)"""
    key: int | None
    """of the rounding bits, 64 bits; None rounds to the nearest"""

    @classmethod
    def at(
        cls,
        step: int,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        key: int | None,
    ) -> "AdamWStep":
        beta1, beta2 = betas
        return cls(
            beta1, beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**step),
            (1 - beta2**step) ** -0.5, key,
        )  # fmt: skip


class Moments(NamedTuple):
    """The state of one tensor of n numbers, changed in place; without scales it is float32 [n]."""

    first: Tensor  # [n] uint8, signed map
    second: Tensor  # [n] uint8, unsigned map
    first_scale: Tensor | None  # [ceil(n / 256)] float32
    second_scale: Tensor | None  # [ceil(n / 256)] float32


def adamw_step(parameter: Tensor, gradient: Tensor, moments: Moments, step: AdamWStep) -> None:
    """One step of AdamW on [n] numbers, in place, with moments that may be 8-bit.

    The moments of this very step enter the update before they are quantised.
    """
    g, p = gradient.float(), parameter.float()
    first, second = moments.first, moments.second
    if moments.first_scale is not None and moments.second_scale is not None:
        first = dequantize(first, moments.first_scale, signed=True)
        second = dequantize(second, moments.second_scale, signed=False)
    first = first * step.beta1 + g * (1 - step.beta1)
    second = second * step.beta2 + g * g * (1 - step.beta2)
    # torch's own float32 square root may be off by a bit on a CPU; the kernels' is exact.
    root = second.double().sqrt().float()
    denominator = root * step.root_correction + step.eps
    p = p * step.decay - first / denominator * step.step_size
    if parameter.dtype == torch.bfloat16 and step.key is not None:
        p = round_stochastically(p, random_bits(step.key, p.numel(), p.device))
    parameter.copy_(p)
    if moments.first_scale is None or moments.second_scale is None:
        moments.first.copy_(first)
        moments.second.copy_(second)
        return
    for x, codes, scale, signed in (
        (first, moments.first, moments.first_scale, True),
        (second, moments.second, moments.second_scale, False),
    ):
        new_codes, new_scale = quantize(x, signed=signed)
        codes.copy_(new_codes)
        scale.copy_(new_scale)
