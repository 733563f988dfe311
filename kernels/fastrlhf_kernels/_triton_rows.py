"""Statistics of rows of logits that exist; `_triton_rows_gradient` goes back through them.

One pass over each row, in parts: a program reduces a span of a row's columns, a second kernel
merges the spans in their order. The spans depend on the vocabulary only, so a row's bits depend on
nothing else, and few rows still fill the device. Formulas: docs/math.md, sections 1 and 2.

Maxima are taken before the temperature divides, here and in columns 0 and 2 of the table: what is
divided is then a difference, and its rounding does not grow with the logits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._records import TABLE_COLUMNS
from ._triton import Variant, base
from ._triton_logits import (
    NUM_WARPS,
    GivenRows,
    block_columns,
    both_biases,
    logits_block,
    parts_of,
    row_options,
    row_start,
    row_types,
    target_logit,
    variant,
)

MOMENTS = tl.constexpr(6)
"""float32 of each part of a row: max, Σe, Σe·(z − max), the reference's first two, the cross sum"""


@triton.jit
def _raised(m, s, u, top, rate):
    """Σe and Σe·(z − m), moved from the maximum m to `top`."""
    shift = (base(m) - base(top)) * rate
    factor = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
    return s * factor, (u + s * shift) * factor


@triton.jit
def _raised_cross(g, s, m, top, other_m, other_top, rate):
    """Σe·((z − m) − (z' − m')), moved to the maxima `top` of z and `other_top` of z'."""
    shift = (base(m) - base(top)) * rate
    factor = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
    return (g + s * (shift - (base(other_m) - base(other_top)) * rate)) * factor


@triton.jit(do_not_specialize=["rows", "columns", "width", "parts", "blocks", "reverse"])
def _statistics_kernel(
    logits_ptr, offsets_ptr, ref_logits_ptr, ref_offsets_ptr, bias_ptr, ref_bias_ptr,
    used_ptr, temperature_ptr, moments_ptr,
    rows, columns, width, parts, blocks, logit_scale, softcap, reverse,
    HAS_REF: tl.constexpr, HEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments of one part of one row: `blocks` blocks of columns."""
    pid = tl.program_id(0).to(tl.int64)
    row, part = pid // parts, (pid % parts).to(tl.int32)
    if not HEAD:
        if not tl.load(used_ptr + row):
            return
    if ALIGNED:
        # The compiler sees from this that no group of 16 columns is cut.
        width = width // 16 * 16
    rate = tl.div_rn(1.0, tl.load(temperature_ptr + row))
    row_ptr = row_start(logits_ptr, offsets_ptr, row, ALIGNED)
    ref_row_ptr = row_ptr
    if HAS_REF:
        ref_row_ptr = row_start(ref_logits_ptr, ref_offsets_ptr, row, ALIGNED)
    m = tl.full([], float("-inf"), tl.float32)
    ref_m = m
    # One sum a lane: within the loop only the maximum is reduced over the block.
    s = tl.zeros([BLOCK], tl.float32)
    u, ref_s, g = s, s, s
    first = part * blocks
    for block in range(first, tl.minimum(first + blocks, tl.cdiv(columns, BLOCK))):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        mask = offs < width
        z = logits_block(
            row_ptr, bias_ptr, offs, columns, mask, logit_scale, softcap,
            HEAD, HAS_BIAS,
        )  # fmt: skip
        top = tl.max(z, 0)
        if HAS_REF:
            ref_z = logits_block(
                ref_row_ptr, ref_bias_ptr, offs, columns, mask, logit_scale, softcap,
                HEAD, HAS_BIAS,
            )  # fmt: skip
            ref_top = tl.max(ref_z, 0)
            if (top > m) | (ref_top > ref_m):
                top, ref_top = tl.maximum(m, top), tl.maximum(ref_m, ref_top)
                if reverse != 0:
                    g = _raised_cross(g, ref_s, ref_m, ref_top, m, top, rate)
                else:
                    g = _raised_cross(g, s, m, top, ref_m, ref_top, rate)
                s, u = _raised(m, s, u, top, rate)
                ref_s, _ = _raised(ref_m, ref_s, ref_s, ref_top, rate)
                m, ref_m = top, ref_top
        elif top > m:
            s, u = _raised(m, s, u, top, rate)
            m = top
        z = (z - base(m)) * rate
        e = tl.exp(z)
        s += e
        # Where e is 0 any finite number will do: it keeps 0·∞ out of the moment.
        u += e * tl.maximum(z, -104.0)
        if HAS_REF:
            ref_z = (ref_z - base(ref_m)) * rate
            ref_e = tl.exp(ref_z)
            ref_s += ref_e
            if reverse != 0:
                g += tl.where(ref_e == 0.0, 0.0, ref_e * (ref_z - z))
            else:
                g += tl.where(e == 0.0, 0.0, e * (z - ref_z))
    out = moments_ptr + part.to(tl.int64) * MOMENTS * rows + row
    tl.store(out, m)
    tl.store(out + rows, tl.sum(s, 0))
    tl.store(out + 2 * rows, tl.sum(u, 0))
    if HAS_REF:
        tl.store(out + 3 * rows, ref_m)
        tl.store(out + 4 * rows, tl.sum(ref_s, 0))
        tl.store(out + 5 * rows, tl.sum(g, 0))


@triton.jit(do_not_specialize=["rows", "columns", "parts", "reverse"])
def _table_kernel(
    moments_ptr, logits_ptr, offsets_ptr, ref_logits_ptr, ref_offsets_ptr, bias_ptr, ref_bias_ptr,
    targets_ptr, used_ptr, temperature_ptr, table_ptr,
    rows, columns, parts, logit_scale, softcap, reverse,
    HAS_REF: tl.constexpr, HEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The moments of a row's parts, merged in their order -> its line of the table."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = row < rows
    if not HEAD:
        mask = mask & (tl.load(used_ptr + row, mask=mask, other=0) != 0)
    rate = tl.div_rn(1.0, tl.load(temperature_ptr + row, mask=mask, other=1.0))
    target = tl.load(targets_ptr + row, mask=mask, other=0)
    m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_ROWS], tl.float32)
    u, ref_m, ref_s, g = s, m, s, s
    out = moments_ptr + row
    for _ in range(parts):
        part_m = tl.load(out, mask=mask, other=0.0)
        part_s = tl.load(out + rows, mask=mask, other=1.0)
        part_u = tl.load(out + 2 * rows, mask=mask, other=0.0)
        top = tl.maximum(m, part_m)
        if HAS_REF:
            part_ref_m = tl.load(out + 3 * rows, mask=mask, other=0.0)
            part_ref_s = tl.load(out + 4 * rows, mask=mask, other=1.0)
            part_g = tl.load(out + 5 * rows, mask=mask, other=0.0)
            ref_top = tl.maximum(ref_m, part_ref_m)
            if reverse != 0:
                g = _raised_cross(g, ref_s, ref_m, ref_top, m, top, rate)
                g += _raised_cross(part_g, part_ref_s, part_ref_m, ref_top, part_m, top, rate)
            else:
                g = _raised_cross(g, s, m, top, ref_m, ref_top, rate)
                g += _raised_cross(part_g, part_s, part_m, top, part_ref_m, ref_top, rate)
            ref_s, _ = _raised(ref_m, ref_s, ref_s, ref_top, rate)
            part_ref_s, _ = _raised(part_ref_m, part_ref_s, part_ref_s, ref_top, rate)
            ref_s, ref_m = ref_s + part_ref_s, ref_top
        s, u = _raised(m, s, u, top, rate)
        part_s, part_u = _raised(part_m, part_s, part_u, top, rate)
        s, u, m = s + part_s, u + part_u, top
        out += MOMENTS * rows
    log_sum = tl.log(s)
    z = target_logit(
        logits_ptr, offsets_ptr, bias_ptr, row, target, columns, mask, logit_scale, softcap,
        HEAD, HAS_BIAS,
    )  # fmt: skip
    logprob = (z - m) * rate - log_sum
    entropy = log_sum - tl.div_rn(u, s)
    ref_log_sum, kl, ref_logprob = s * 0.0, s * 0.0, s * 0.0
    if HAS_REF:
        ref_log_sum = tl.log(ref_s)
        gap = log_sum - ref_log_sum
        kl = tl.where(reverse != 0, tl.div_rn(g, ref_s) + gap, tl.div_rn(g, s) - gap)
        ref_z = target_logit(
            ref_logits_ptr, ref_offsets_ptr, ref_bias_ptr, row, target, columns, mask,
            logit_scale, softcap, HEAD, HAS_BIAS,
        )  # fmt: skip
        ref_logprob = (ref_z - ref_m) * rate - ref_log_sum
    else:
        ref_m = s * 0.0
    line = table_ptr + row * 8
    # Comparisons that a NaN fails, so that it stays visible.
    tl.store(line, m, mask=mask)
    tl.store(line + 1, log_sum, mask=mask)
    tl.store(line + 2, ref_m, mask=mask)
    tl.store(line + 3, ref_log_sum, mask=mask)
    tl.store(line + 4, tl.where(logprob > 0.0, 0.0, logprob), mask=mask)
    tl.store(line + 5, tl.where(entropy < 0.0, 0.0, entropy), mask=mask)
    tl.store(line + 6, tl.where(kl < 0.0, 0.0, kl), mask=mask)
    tl.store(line + 7, tl.where(ref_logprob > 0.0, 0.0, ref_logprob), mask=mask)


BLOCK_ROWS = 64
"""lines of the table that one program makes"""


def _launch(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    used: Tensor | None,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    table: Tensor,
    *,
    columns: int,
    logit_scale: float,
    softcap: float | None,
    reverse: bool,
) -> None:
    rows = targets.numel()
    assert table.shape == (rows, TABLE_COLUMNS) and table.is_contiguous()
    if rows == 0:
        return
    given = GivenRows.of(logits, ref_logits)
    bias, ref_bias = both_biases(bias, ref_bias, given.has_reference)
    block = block_columns(given.has_reference, used is None)
    parts, blocks = parts_of(columns, block)
    moments = table.new_empty(parts, MOMENTS.value, rows)
    # A pointer that is not there is never read.
    absent, numbers = table, (float(logit_scale), float(softcap or 0.0), int(reverse))
    used = absent if used is None else used
    biases = (absent if bias is None else bias, absent if ref_bias is None else ref_bias)
    options = {
        "HAS_REF": given.has_reference, "HEAD": used is absent, "HAS_BIAS": bias is not None,
    }  # fmt: skip
    _statistics_kernel[(rows * parts,)](
        *given[:4], *biases, used, temperature, moments,
        rows, columns, logits.shape[-1], parts, blocks, *numbers,
        **options, ALIGNED=given.aligned, BLOCK=block, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    _table_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
        moments, *given[:4], *biases, targets, used, temperature, table,
        rows, columns, parts, *numbers, **options, BLOCK_ROWS=BLOCK_ROWS, num_warps=1, num_stages=1,
    )  # fmt: skip


def logit_statistics(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    used: Tensor,
    temperature: Tensor,
    table: Tensor,
    *,
    columns: int,
    reverse: bool,
) -> None:
    """Fill table [N, TABLE_COLUMNS] where used [N], from the first `columns` of logits [..., V].

    The logits are read where they lie, whatever the strides of their leading dimensions; rows that
    are not used are not read.
    """
    _launch(
        logits, ref_logits, targets, used, None, None, temperature, table,
        columns=columns, logit_scale=1.0, softcap=None, reverse=reverse,
    )  # fmt: skip


def row_statistics(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    table: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    reverse: bool,
) -> None:
    """Fill table [n, TABLE_COLUMNS] from a head's raw products [n, V], which stay as they are."""
    assert logits.dtype == torch.float32
    _launch(
        logits, ref_logits, targets, None, bias, ref_bias, temperature, table,
        columns=logits.shape[-1], logit_scale=logit_scale, softcap=softcap, reverse=reverse,
    )  # fmt: skip


def variants(target: str) -> Iterator[Variant]:
    del target  # one configuration serves all
    for options in row_options():
        types = row_types(options)
        block = block_columns(options.constexprs["HAS_REF"], options.constexprs["HEAD"])
        for aligned in (False, True):
            constexprs = {**options.constexprs, "ALIGNED": aligned, "BLOCK": block}
            config = f"{block} w{NUM_WARPS}{options.words}{' aligned' if aligned else ''}"
            yield variant(
                _statistics_kernel, "row_statistics", config, options.dtype, constexprs, types,
                NUM_WARPS,
            )  # fmt: skip
        yield variant(
            _table_kernel, "row_table", f"{BLOCK_ROWS} w1{options.words}", options.dtype,
            {**options.constexprs, "BLOCK_ROWS": BLOCK_ROWS}, types, 1,
        )  # fmt: skip
