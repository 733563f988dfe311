"""Generalised advantage estimation and masked whitening.

Advantages go through a sequence step by step, in the order of `reference.gae`; the columns that one
program reads a step later lie in the lines of the cache that it has read. Moments are those of
blocks, merged in a fixed order. Formulas: docs/math.md, sections 4 and 5.2.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import Variant
from ._triton_logits import variant
from ._triton_tokens import flat

BLOCK_SEQUENCES = 32
WHITEN_BLOCK = 4096
PARTS = 128
"""moments of blocks that are merged at a time"""


@triton.jit(do_not_specialize=["sequences", "length"])
def _gae_kernel(
    rewards_ptr, values_ptr, mask_ptr, advantages_ptr, returns_ptr,
    sequences, length, gamma, lam, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = sequence < sequences
    next_value = tl.zeros([BLOCK], tl.float32)
    next_advantage = tl.zeros([BLOCK], tl.float32)
    for step in range(0, length):
        place = sequence * length + (length - 1 - step)
        valid = inside & (tl.load(mask_ptr + place, mask=inside, other=0) != 0)
        value = tl.load(values_ptr + place, mask=valid, other=0.0)
        reward = tl.load(rewards_ptr + place, mask=valid, other=0.0)
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        tl.store(advantages_ptr + place, tl.where(valid, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + place, tl.where(valid, advantage + value, 0.0), mask=inside)
        # A masked token is skipped: what lies before it sees what lies after it.
        next_value = tl.where(valid, value, next_value)
        next_advantage = tl.where(valid, advantage, next_advantage)


@triton.jit(do_not_specialize=["count", "parts"])
def _moments_kernel(x_ptr, mask_ptr, parts_ptr, count, parts, BLOCK: tl.constexpr):
    """Number, mean, what its rounding lost, and squared deviations of a block's kept entries."""
    pid = tl.program_id(0).to(tl.int64)
    place = pid * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    mask = inside & (tl.load(mask_ptr + place, mask=inside, other=0) != 0)
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    number = tl.sum(tl.where(mask, 1.0, 0.0), 0)
    mean = tl.div_rn(tl.sum(x, 0), tl.maximum(number, 1.0))
    gap = tl.where(mask, x - mean, 0.0)
    tl.store(parts_ptr + pid, number)
    tl.store(parts_ptr + parts + pid, mean)
    tl.store(parts_ptr + 2 * parts + pid, tl.div_rn(tl.sum(gap, 0), tl.maximum(number, 1.0)))
    tl.store(parts_ptr + 3 * parts + pid, tl.sum(gap * gap, 0))


@triton.jit(do_not_specialize=["count", "parts", "center"])
def _whiten_kernel(
    x_ptr, mask_ptr, parts_ptr, out_ptr, count, parts, center,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the moments of all blocks, in the same order in every program, and applies them."""
    numbers = tl.zeros([PARTS], tl.float32)
    sums, rests, squares = numbers, numbers, numbers
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        number = tl.load(parts_ptr + part, mask=part < parts, other=0.0)
        numbers += number
        sums += number * tl.load(parts_ptr + parts + part, mask=part < parts, other=0.0)
    kept = tl.sum(numbers, 0)
    mean = tl.div_rn(tl.sum(sums, 0), tl.maximum(kept, 1.0))
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        number = tl.load(parts_ptr + part, mask=part < parts, other=0.0)
        gap = tl.load(parts_ptr + parts + part, mask=part < parts, other=0.0) - mean
        gap += tl.load(parts_ptr + 2 * parts + part, mask=part < parts, other=0.0)
        rests += number * gap
        squares += tl.load(parts_ptr + 3 * parts + part, mask=part < parts, other=0.0)
        squares += number * gap * gap
    rest = tl.div_rn(tl.sum(rests, 0), tl.maximum(kept, 1.0))
    variance = tl.div_rn(tl.sum(squares, 0), tl.maximum(kept - 1.0, 1.0))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + 1e-8))
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    mask = inside & (tl.load(mask_ptr + place, mask=inside, other=0) != 0)
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    whitened = ((x - mean) - rest) * rstd + tl.where(center != 0, 0.0, mean + rest)
    tl.store(out_ptr + place, tl.where(mask, whitened, 0.0), mask=inside)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`reference.gae` of [B, T], in its order of operations."""
    sequences, length = rewards.shape
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if rewards.numel():
        _gae_kernel[(triton.cdiv(sequences, BLOCK_SEQUENCES),)](
            flat(rewards), flat(values), flat(mask), advantages, returns, sequences, length,
            float(gamma), float(lam), BLOCK=BLOCK_SEQUENCES, num_warps=1,
        )  # fmt: skip
    return advantages, returns


def whiten(x: Tensor, mask: Tensor, center: bool) -> Tensor:
    """`reference.whiten`; the moments of blocks are merged in a fixed order."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    count = x.numel()
    if count:
        entries, kept = flat(x), flat(mask)
        blocks = triton.cdiv(count, WHITEN_BLOCK)
        parts = torch.empty(4, blocks, dtype=torch.float32, device=x.device)
        options = {"BLOCK": WHITEN_BLOCK, "num_warps": 8}
        _moments_kernel[(blocks,)](entries, kept, parts, count, blocks, **options)
        _whiten_kernel[(blocks,)](
            entries, kept, parts, out, count, blocks, int(center), PARTS=PARTS, **options
        )
    return out


def variants(target: str) -> Iterator[Variant]:
    del target  # one configuration serves all
    types = {"mask_ptr": "*i1", "gamma": "fp32", "lam": "fp32"}
    yield variant(
        _gae_kernel, "gae", f"{BLOCK_SEQUENCES} w1", "fp32", {"BLOCK": BLOCK_SEQUENCES}, types, 1
    )
    block, words = {"BLOCK": WHITEN_BLOCK}, f"{WHITEN_BLOCK} w8"
    yield variant(_moments_kernel, "moments", words, "fp32", block, types, 8)
    yield variant(_whiten_kernel, "whiten", words, "fp32", {"PARTS": PARTS, **block}, types, 8)
