"""Statistics of a linear head in Triton: logits tile by tile, reduced before they leave the chip.

A program multiplies a tile of rows with a tile of the vocabulary and keeps, per row, the partial
sums of docs/math.md, section 1; a second kernel merges them in a fixed order. Logits stay in
float32 from the dot product on, there are no atomics, and a row's bits depend neither on the other
rows nor on how many of them share a launch. Operands of several dtypes, or with strided columns,
are brought to one form a slice of the vocabulary at a time. _triton_head_gradient has the backward.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._head import HeadInputs, HeadOptions
from ._records import EXTRA_STATS, TABLE_COLUMNS
from ._triton import Variant, base, exp_and_moment, shifted_cross
from ._triton_head_tile import (
    DTYPES,
    REFERENCES,
    TILE_DIVISIBLE,
    HeadLaunch,
    at_least,
    at_most,
    head_tile,
    head_tiles,
    smallest_tile,
    strip_logits,
    strips,
    tile_constexprs,
    tile_of,
    tile_signature,
)  # fmt: skip

MERGE_ROWS, MERGE_TILES, MERGE_WARPS = 16, 32, 4


@triton.jit
def tile_max(z):
    left, right = tl.maximum(tl.max(z[0], 1), tl.max(z[1], 1)), tl.max(z[2], 1)
    return tl.maximum(tl.maximum(left, right), tl.max(z[3], 1))


@triton.jit
def tile_sum(z, end):
    """Σ z over the columns before `end`."""
    width: tl.constexpr = z[0].shape[1]
    total = 0.0
    for i in tl.static_range(4):
        offs = i * width + tl.arange(0, width)
        total += tl.sum(tl.where(offs[None, :] < end, z[i], 0.0), 1)
    return total


@triton.jit
def tile_logits(product, before, after, softcap):
    a, b, c, d = strips(product)
    a, b = strip_logits(a, before, after, softcap), strip_logits(b, before, after, softcap)
    c, d = strip_logits(c, before, after, softcap), strip_logits(d, before, after, softcap)
    return a, b, c, d


@triton.jit
def without_columns(z, end):
    """Strips with −∞ in the columns from `end` on, which only the last tile has."""
    width: tl.constexpr = z[0].shape[1]
    a, b, c, d = z
    if end < 4 * width:
        offs = tl.arange(0, width)[None, :]
        a = tl.where(offs < end, a, float("-inf"))
        b = tl.where(offs + width < end, b, float("-inf"))
        c = tl.where(offs + 2 * width < end, c, float("-inf"))
        d = tl.where(offs + 3 * width < end, d, float("-inf"))
    return a, b, c, d


@triton.jit
def store_column(out_ptrs, z, target, mask):
    """Of each row the logit in column `target`."""
    width: tl.constexpr = z[0].shape[1]
    chosen = tl.zeros((z[0].shape[0],), tl.float32)
    for i in tl.static_range(4):
        offs = i * width + tl.arange(0, width)
        chosen += tl.sum(tl.where(offs[None, :] == target[:, None], z[i], 0.0), 1)
    tl.store(out_ptrs, chosen, mask=mask)


@triton.jit
def own_sums(z, b):
    """Σ e and Σ e·(z − b) with e = exp(z − b)."""
    s, u = 0.0, 0.0
    for i in tl.static_range(4):
        e, moment = exp_and_moment(z[i], b[:, None])
        s += tl.sum(e, 1)
        u += tl.sum(moment, 1)
    return s, u


@triton.jit
def sum_of_squares(z, b):
    """Σ exp(z − b)²."""
    squares = 0.0
    for i in tl.static_range(4):
        squares += tl.sum(tl.exp(2.0 * (z[i] - b[:, None])), 1)
    return squares


@triton.jit
def ref_sums(z, ref_z, b, ref_b, reverse):
    """Σ eʳ, and Σ e·((z − b) − (zʳ − bʳ)) or its mirror image Σ eʳ·((zʳ − bʳ) − (z − b))."""
    ref_s, g = 0.0, 0.0
    for i in tl.static_range(4):
        x, ref_x = z[i] - b[:, None], ref_z[i] - ref_b[:, None]
        ref_e = tl.exp(ref_x)
        weight = tl.where(reverse != 0, ref_e, tl.exp(x))
        ref_s += tl.sum(ref_e, 1)
        g += tl.sum(tl.where(weight == 0.0, 0.0, weight * (x - ref_x)), 1)
    return ref_s, tl.where(reverse != 0, -g, g)


@triton.jit(
    do_not_specialize=[
        "n", "columns", "first_column", "stride_partial",
        "before", "softcap", "after_scale", "has_bias", "has_ref_bias", "reverse",
        "partials", "extra",
    ],
    do_not_specialize_on_alignment=[
        "bias_ptr", "ref_bias_ptr", "rows_ptr", "targets_ptr", "temperature_ptr",
    ],
)  # fmt: skip
def _head_partials(
    hidden_ptr, weight_ptr, bias_ptr, ref_hidden_ptr, ref_weight_ptr, ref_bias_ptr,
    rows_ptr, targets_ptr, temperature_ptr,
    n, columns, first_column, size, ref_size,
    stride_hidden, stride_weight, stride_ref_hidden, stride_ref_weight,
    before, softcap, after_scale, has_bias, has_ref_bias, reverse,
    partials_ptr, target_logits_ptr, stride_partial, partials, extra,
    REFERENCE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    UPCAST_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill [tiles, partials, stride_partial], and target_logits [2, stride_partial]."""
    pid_m, pid_n = tile_of(n, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n
    index = tl.load(rows_ptr + tl.minimum(offs_m, n - 1))
    start = pid_n * BLOCK_N
    end = columns - start
    product, ref_product = head_tile(
        hidden_ptr, weight_ptr, bias_ptr, ref_hidden_ptr, ref_weight_ptr, ref_bias_ptr,
        index, start, columns, size, ref_size,
        stride_hidden, stride_weight, stride_ref_hidden, stride_ref_weight,
        has_bias, has_ref_bias, REFERENCE, BLOCK_N, BLOCK_K, UPCAST_DOT, PRECISION,
    )  # fmt: skip
    after = after_scale / tl.load(temperature_ptr + index)
    target = tl.load(targets_ptr + index) - first_column - start
    mask_target = mask_m & (target >= 0) & (target < tl.minimum(end, BLOCK_N))
    target = tl.where(mask_target, target, 0).to(tl.int32)
    has_target = tl.max(mask_target.to(tl.int32), 0) != 0

    # What a row needs by itself comes first: it then takes no registers beside the sums. What few
    # ask for stands in branches, for the same reason.
    out = partials_ptr + pid_n.to(tl.int64) * partials * stride_partial + offs_m
    z = tile_logits(product, before, after, softcap)
    if extra != 0:
        total = tile_sum(z, end)
        tl.store(out + (partials - 2) * stride_partial, total, mask=mask_m)
    z = without_columns(z, end)
    if REFERENCE != 0:
        ref_z = without_columns(tile_logits(ref_product, before, after, softcap), end)
    if has_target:
        store_column(target_logits_ptr + offs_m, z, target, mask_target)
        if REFERENCE != 0:
            store_column(target_logits_ptr + stride_partial + offs_m, ref_z, target, mask_target)
    m = tile_max(z)
    if extra != 0:
        squares = sum_of_squares(z, base(m))
        tl.store(out + (partials - 1) * stride_partial, squares, mask=mask_m)
    s, u = own_sums(z, base(m))
    tl.store(out, m, mask=mask_m)
    tl.store(out + stride_partial, s, mask=mask_m)
    tl.store(out + 2 * stride_partial, u, mask=mask_m)
    if REFERENCE != 0:
        ref_m = tile_max(ref_z)
        ref_s, g = ref_sums(z, ref_z, base(m), base(ref_m), reverse)
        tl.store(out + 3 * stride_partial, ref_m, mask=mask_m)
        tl.store(out + 4 * stride_partial, ref_s, mask=mask_m)
        tl.store(out + 5 * stride_partial, g, mask=mask_m)


@triton.jit
def highest(partials_ptr, offs_m, mask_m, tiles, stride_tile, BLOCK_T: tl.constexpr):
    """The maximum over tiles of a row of partials; −∞ for rows that are not there."""
    top = tl.full(offs_m.shape, float("-inf"), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask = (offs_t < tiles)[:, None] & mask_m[None, :]
        m = tl.load(
            partials_ptr + offs_t.to(tl.int64)[:, None] * stride_tile + offs_m[None, :],
            mask=mask, other=float("-inf"),
        )  # fmt: skip
        top = tl.maximum(top, tl.max(m, 0))
    return top


@triton.jit(
    do_not_specialize=["n", "tiles", "vocab", "reverse", "stride_partial", "partials", "extra"],
    do_not_specialize_on_alignment=["table_ptr", "extra_ptr"],
)
def _merge_partials(
    partials_ptr, target_logits_ptr, table_ptr, extra_ptr,
    n, tiles, vocab, reverse, stride_partial, partials, extra,
    HAS_REF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """table [n, 8] and extra [n, 3] of the partials of all tiles."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n
    stride_tile = stride_partial.to(tl.int64) * partials
    top = highest(partials_ptr, offs_m, mask_m, tiles, stride_tile, BLOCK_T)
    ref_top = top
    if HAS_REF:
        ref_m_ptr = partials_ptr + 3 * stride_partial
        ref_top = highest(ref_m_ptr, offs_m, mask_m, tiles, stride_tile, BLOCK_T)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    s, u, ref_s, g, total, squares = zero, zero, zero, zero, zero, zero
    for first in range(0, tiles, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask = (offs_t < tiles)[:, None] & mask_m[None, :]
        at = partials_ptr + offs_t.to(tl.int64)[:, None] * stride_tile + offs_m[None, :]
        m = tl.load(at, mask=mask, other=float("-inf"))
        tile_s = tl.load(at + stride_partial, mask=mask, other=0.0)
        tile_u = tl.load(at + 2 * stride_partial, mask=mask, other=0.0)
        shift = base(m) - base(top)[None, :]
        factor = tl.exp(m - base(top)[None, :])
        s += tl.sum(tile_s * factor, 0)
        u += tl.sum((tile_u + tile_s * shift) * factor, 0)
        if extra != 0:
            total += tl.sum(tl.load(at + (partials - 2) * stride_partial, mask=mask, other=0.0), 0)
            e = tl.load(at + (partials - 1) * stride_partial, mask=mask, other=0.0)
            squares += tl.sum(e * factor * factor, 0)
        if HAS_REF:
            ref_m = tl.load(at + 3 * stride_partial, mask=mask, other=float("-inf"))
            tile_ref_s = tl.load(at + 4 * stride_partial, mask=mask, other=0.0)
            tile_g = tl.load(at + 5 * stride_partial, mask=mask, other=0.0)
            ref_s += tl.sum(tile_ref_s * tl.exp(ref_m - base(ref_top)[None, :]), 0)
            if reverse != 0:
                moved = shifted_cross(tile_g, tile_ref_s, ref_m, m, ref_top[None, :], top[None, :])
            else:
                moved = shifted_cross(tile_g, tile_s, m, ref_m, top[None, :], ref_top[None, :])
            g += tl.sum(moved, 0)

    log_sum = tl.log(s)
    z = tl.load(target_logits_ptr + offs_m, mask=mask_m, other=0.0)
    out = table_ptr + offs_m.to(tl.int64) * 8
    tl.store(out, top, mask=mask_m)
    tl.store(out + 1, log_sum, mask=mask_m)
    tl.store(out + 4, at_most((z - base(top)) - log_sum, 0.0), mask=mask_m)
    tl.store(out + 5, at_least(log_sum - u / s, 0.0), mask=mask_m)
    ref_log_sum, kl, ref_logprob = zero, zero, zero
    if HAS_REF:
        ref_log_sum = tl.log(ref_s)
        ref_z = tl.load(target_logits_ptr + stride_partial + offs_m, mask=mask_m, other=0.0)
        ref_logprob = at_most((ref_z - base(ref_top)) - ref_log_sum, 0.0)
        forward = (g / s - log_sum) + ref_log_sum
        backward = (g / ref_s - ref_log_sum) + log_sum
        kl = at_least(tl.where(reverse != 0, backward, forward), 0.0)
    tl.store(out + 2, tl.where(HAS_REF, ref_top, 0.0), mask=mask_m)
    tl.store(out + 3, ref_log_sum, mask=mask_m)
    tl.store(out + 6, kl, mask=mask_m)
    tl.store(out + 7, ref_logprob, mask=mask_m)
    if extra != 0:
        out = extra_ptr + offs_m.to(tl.int64) * 3
        tl.store(out, total / vocab, mask=mask_m)
        tl.store(out + 1, tl.where(z == top, 1.0, 0.0), mask=mask_m)
        tl.store(out + 2, tl.log(squares) - 2.0 * log_sum, mask=mask_m)


def head_statistics(
    inputs: HeadInputs, rows: Tensor, options: HeadOptions, *, extra: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The table [n, TABLE_COLUMNS] of `rows` [n], and with `extra` their [n, 3] of EXTRA_STATS.

    As many rows at a time as their partial sums fit options.workspace_bytes, at least one tile of
    them; a row's bits do not depend on that. Rows that are not in `rows` are not read. is_top1 is 1
    for every target whose logit ties exactly for the largest; elsewhere the first of them counts.
    """
    head = HeadLaunch("partials", inputs, options)
    count, tiles = rows.numel(), head.tiles
    table = inputs.temperature.new_empty(count, TABLE_COLUMNS)
    statistics = inputs.temperature.new_empty(count, len(EXTRA_STATS)) if extra else None
    if count == 0:
        return table, statistics
    # m, s, u; mʳ, sʳ, g; Σ z, Σ e².
    partials = 3 + 3 * (head.reference != 0) + 2 * extra
    vocab_tiles = triton.cdiv(options.valid_vocab, tiles.block_n)
    size, span_columns = options.workspace_bytes, options.valid_vocab
    if not head.direct:
        size //= 2
        span_columns = head.columns_within(size, head.copied_bytes)
    fitting = max(1, size // (4 * vocab_tiles * partials * tiles.block_m))
    step = min(fitting * tiles.block_m, triton.cdiv(count, 16) * 16)
    workspace = table.new_empty(vocab_tiles, partials, step)
    target_logits = table.new_empty(2, step)
    for first in range(0, count, step):
        chunk = rows[first : first + step]
        n = chunk.numel()
        # A target outside the vocabulary, which is checked on the CPU only, has no logit.
        target_logits.fill_(torch.nan)
        for span in head.spans(span_columns):
            grid = (triton.cdiv(n, tiles.block_m) * triton.cdiv(span.columns, tiles.block_n),)
            _head_partials[grid](
                *head.arguments(span, chunk),
                workspace[span.start // tiles.block_n :], target_logits, step,
                partials, int(extra), **head.constexprs, **head.launch,
            )  # fmt: skip
        _merge_partials[(triton.cdiv(n, MERGE_ROWS),)](
            workspace, target_logits, table[first:],
            table if statistics is None else statistics[first:],
            n, vocab_tiles, options.valid_vocab, head.reverse, step,
            partials, int(extra), HAS_REF=head.reference != 0,
            BLOCK_M=MERGE_ROWS, BLOCK_T=MERGE_TILES, num_warps=MERGE_WARPS,
        )  # fmt: skip
    return table, statistics


def variants(target: str) -> Iterator[Variant]:
    """Every compilation of this module's kernels that a launch on `target` can ask for."""
    for dtype, reference, tiles in head_tiles("partials", target):
        yield Variant(
            _head_partials, "head_partials", tiles.describe(REFERENCES[reference]), dtype,
            tile_signature(dtype)
            | dict.fromkeys(("partials_ptr", "target_logits_ptr"), "*fp32")
            | dict.fromkeys(("stride_partial", "partials", "extra"), "i32"),
            tile_constexprs(target, DTYPES[dtype], reference, tiles),
            tiles.num_warps, tiles.num_stages, True,
            (*TILE_DIVISIBLE, "partials_ptr", "target_logits_ptr"),
            smallest_tile(target, dtype, reference),
        )  # fmt: skip
    pointers = ("partials_ptr", "target_logits_ptr", "table_ptr", "extra_ptr")
    integers = ("n", "tiles", "vocab", "reverse", "stride_partial", "partials", "extra")
    for has_ref in (False, True):
        yield Variant(
            _merge_partials, "merge_partials",
            f"{MERGE_ROWS}x{MERGE_TILES} w{MERGE_WARPS}" + " ref" * has_ref, "fp32",
            dict.fromkeys(pointers, "*fp32") | dict.fromkeys(integers, "i32"),
            {"HAS_REF": has_ref, "BLOCK_M": MERGE_ROWS, "BLOCK_T": MERGE_TILES},
            MERGE_WARPS, 3, False, ("partials_ptr", "target_logits_ptr"),
        )  # fmt: skip
