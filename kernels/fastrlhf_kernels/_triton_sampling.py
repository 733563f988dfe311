"""One token per row of logits by the inverse of the cumulative distribution, without a sort.

top_k and top_p are thresholds on the logits, found bit by bit: floats sort like the integers that
hold their bits, so at most 32 passes over a row, which stays in the cache, give the exact one.

Deviation from `reference.sample`, for exact ties at the threshold of top_p: all of them stay, where
the reference keeps those that its sort happens to put first. (top_k keeps all ties in both.)
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import Variant
from ._triton_logits import TYPES, is_aligned, variant

BLOCK = 1024
NUM_WARPS = 8
MINUS_INFINITY = tl.constexpr(-2_139_095_041)
"""the place of −inf among the ordered integers"""


@triton.jit
def _ordered(z):
    """Integers that are ordered, and tied, like the floats; a NaN of either sign above them all."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(z != z, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _block(row_ptr, start, columns, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + offs, mask=offs < columns, other=float("-inf"))
    return offs, z.to(tl.float32)


@triton.jit
def _mass(row_ptr, columns, m, rate, least, BLOCK: tl.constexpr):
    """Σ e^((z − m)/τ) over the logits from `least` on."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        _, z = _block(row_ptr, start, columns, BLOCK)
        sums += tl.where(_ordered(z) >= least, tl.exp((z - m) * rate), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _threshold(row_ptr, columns, m, rate, top_k, top_p, BLOCK: tl.constexpr):
    """The least logit, as an ordered integer, that top_k and then top_p keep."""
    least = tl.full([], MINUS_INFINITY, tl.int64)
    top = _ordered(m).to(tl.int64)
    if top_k > 0:
        # At least top_k logits are ≥ least, and fewer are ≥ beyond.
        beyond = top + 1
        while beyond - least > 1:
            middle = least + (beyond - least) // 2
            counts = tl.zeros([BLOCK], tl.int32)
            for start in range(0, columns, BLOCK):
                _, z = _block(row_ptr, start, columns, BLOCK)
                counts += (_ordered(z) >= middle).to(tl.int32)
            count = tl.sum(counts, 0)
            if count >= top_k:
                least = middle
            else:
                beyond = middle
            if count == top_k:
                beyond = middle + 1
    if top_p < 1.0:
        # A token stays while the mass above it is less than `wanted`.
        wanted = top_p * _mass(row_ptr, columns, m, rate, least, BLOCK)
        dropped = least - 1
        least = top
        while least - dropped > 1:
            middle = dropped + (least - dropped) // 2
            if _mass(row_ptr, columns, m, rate, middle + 1, BLOCK) < wanted:
                least = middle
            else:
                dropped = middle
    return least


@triton.jit(do_not_specialize=["columns", "stride", "top_k"])
def _sample_kernel(
    logits_ptr, temperature_ptr, uniform_ptr, tokens_ptr, logprobs_ptr,
    columns, stride, top_k, top_p,
    NARROWED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    if ALIGNED:
        # The compiler sees from this that no group of 16 columns is cut.
        row_ptr, columns = tl.multiple_of(row_ptr, 16), columns // 16 * 16
    rate = tl.div_rn(1.0, tl.load(temperature_ptr + row))
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        _, z = _block(row_ptr, start, columns, BLOCK)
        tops = tl.maximum(tops, z)
    m = tl.max(tops, 0)
    total = _mass(row_ptr, columns, m, rate, MINUS_INFINITY, BLOCK)
    # A row of −inf alone gives NaN like one that holds a NaN or +inf.
    if total != total:
        tl.store(tokens_ptr + row, -1)
        tl.store(logprobs_ptr + row, 0.0)
        return
    least = tl.full([], MINUS_INFINITY, tl.int64)
    if NARROWED:
        least = _threshold(row_ptr, columns, m, rate, top_k, top_p, BLOCK)
    # Sums of blocks are added up in float64, in one order here and below: u < 1 finds a block.
    kept = tl.zeros([], tl.float64)
    for start in range(0, columns, BLOCK):
        _, z = _block(row_ptr, start, columns, BLOCK)
        e = tl.where(_ordered(z) >= least, tl.exp((z - m) * rate), 0.0)
        kept += tl.sum(e, 0).to(tl.float64)
    wanted = tl.load(uniform_ptr + row).to(tl.float64) * kept
    below = tl.zeros([], tl.float64)
    token = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < columns:
        offs, z = _block(row_ptr, start, columns, BLOCK)
        e = tl.where(_ordered(z) >= least, tl.exp((z - m) * rate), 0.0)
        through = below + tl.sum(e, 0).to(tl.float64)
        start += BLOCK
        if through > wanted:
            reached = tl.cumsum(e, 0) > (wanted - below).to(tl.float32)
            # The sum of the block may be rounded above its last step: its last token is meant.
            last = tl.max(tl.where(e > 0.0, offs, 0), 0)
            token = tl.min(tl.where(reached & (e > 0.0), offs, last), 0)
            start = columns
        below = through
    logprob = (tl.load(row_ptr + token).to(tl.float32) - m) * rate - tl.log(total)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, tl.minimum(logprob, 0.0))


def sample(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Tokens [B] and log-probabilities [B] of logits [B, V] at `uniform` [B] in [0, 1).

    −1 and 0 where a row holds NaN or +inf, or nothing but −inf.
    """
    rows, columns = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _sample_kernel[(rows,)](
            logits, temperature, uniform, tokens, logprobs,
            columns, logits.stride(0), top_k, float(top_p),
            NARROWED=bool(top_k) or top_p < 1, ALIGNED=is_aligned(logits), BLOCK=BLOCK,
            num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
    return tokens, logprobs


def variants(target: str) -> Iterator[Variant]:
    del target  # one configuration serves all
    types = {"tokens_ptr": "*i64", "top_p": "fp32"}
    for dtype, narrowed, aligned in product(TYPES, (False, True), (False, True)):
        words = f"{' narrowed' if narrowed else ''}{' aligned' if aligned else ''}"
        yield variant(
            _sample_kernel, "sample", f"{BLOCK} w{NUM_WARPS}{words}", dtype,
            {"NARROWED": narrowed, "ALIGNED": aligned, "BLOCK": BLOCK},
            {**types, "logits_ptr": TYPES[dtype]}, NUM_WARPS,
        )  # fmt: skip
