"""The gradient of rows of logits that exist, from the table that `_triton_rows` made of them.

It may be written over the logits themselves: every block is read before it is written, by the
program that writes it. Not so where rows move (`slots`): they need memory of their own, because
another program may not have read yet what lies there. Formulas: docs/math.md, section 2.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._records import TABLE_COLUMNS
from ._triton import Variant, own_gradient
from ._triton_logits import (
    NUM_WARPS,
    TYPES,
    GivenRows,
    block_columns,
    both_biases,
    is_aligned,
    logits_block,
    parts_of,
    rounded,
    row_offsets,
    row_options,
    row_start,
    row_types,
    variant,
)


@triton.jit(do_not_specialize=["columns", "width", "parts", "blocks", "reverse"])
def _gradient_kernel(
    logits_ptr, offsets_ptr, ref_logits_ptr, ref_offsets_ptr, bias_ptr, ref_bias_ptr,
    targets_ptr, temperature_ptr, table_ptr, coefficients_ptr, gradient_ptr, gradient_offsets_ptr,
    columns, width, parts, blocks, logit_scale, softcap, reverse,
    HAS_REF: tl.constexpr, HEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one row; each block is read before it is written, so it may be in place."""
    pid = tl.program_id(0).to(tl.int64)
    row, part = pid // parts, (pid % parts).to(tl.int32)
    # Rows that have no place in the gradient are told by a negative one.
    if tl.load(gradient_offsets_ptr + row) < 0:
        return
    if ALIGNED:
        # The compiler sees from this that no group of 16 columns is cut.
        width = width // 16 * 16
    gradient_row_ptr = row_start(gradient_ptr, gradient_offsets_ptr, row, ALIGNED)
    first = part * blocks
    last = tl.minimum(first + blocks, tl.cdiv(width, BLOCK))
    a = tl.load(coefficients_ptr + 3 * row)
    b = tl.load(coefficients_ptr + 3 * row + 1)
    c = tl.load(coefficients_ptr + 3 * row + 2)
    if (a == 0.0) & (b == 0.0) & (c == 0.0):
        for block in range(first, last):
            offs = block * BLOCK + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], gradient_ptr.dtype.element_ty)
            tl.store(gradient_row_ptr + offs, zeros, mask=offs < width)
        return
    rate = tl.div_rn(1.0, tl.load(temperature_ptr + row))
    target = tl.load(targets_ptr + row)
    row_ptr = row_start(logits_ptr, offsets_ptr, row, ALIGNED)
    line = table_ptr + row * 8
    m, log_sum = tl.load(line), tl.load(line + 1)
    constant = -a - b * tl.load(line + 5)
    on_logprob = -b
    if HAS_REF:
        # Without a coefficient of the KL the reference is not read.
        ref_width = tl.where(c != 0.0, width, 0)
        ref_row_ptr = row_start(ref_logits_ptr, ref_offsets_ptr, row, ALIGNED)
        ref_m, ref_log_sum = tl.load(line + 2), tl.load(line + 3)
        forward = tl.where(reverse != 0, 0.0, c)
        constant -= tl.where(forward != 0.0, forward * tl.load(line + 6), 0.0)
        on_logprob += forward
    for block in range(first, last):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        mask = offs < width
        z = logits_block(
            row_ptr, bias_ptr, offs, columns, mask, logit_scale, softcap,
            HEAD, HAS_BIAS,
        )  # fmt: skip
        logprob = (z - m) * rate
        ref_part = 0.0
        if HAS_REF:
            ref_z = logits_block(
                ref_row_ptr, ref_bias_ptr, offs, columns, offs < ref_width, logit_scale, softcap,
                HEAD, HAS_BIAS,
            )  # fmt: skip
            ref_logprob = (ref_z - ref_m) * rate - ref_log_sum
            ref_part = tl.where(forward != 0.0, -forward * ref_logprob, 0.0)
        gradient = own_gradient(logprob, 0.0, log_sum, constant, on_logprob, ref_part)
        if HAS_REF:
            if (reverse != 0) & (c != 0.0):
                pull = c * (tl.exp(logprob - log_sum) - tl.exp(ref_logprob))
                # A column that does not exist has no gradient, whatever the reference says of it.
                gradient += tl.where(z != float("-inf"), pull, 0.0)
        gradient = (gradient + tl.where(offs == target, a, 0.0)) * rate
        if HEAD:
            gradient *= logit_scale
            if softcap > 0.0:
                tanh = z / softcap
                gradient = tl.where(offs < columns, gradient * (1.0 - tanh * tanh), 0.0)
        gradient = rounded(gradient, gradient_ptr.dtype.element_ty)
        tl.store(gradient_row_ptr + offs, gradient, mask=mask)


def _launch(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    table: Tensor,
    coefficients: Tensor,
    gradient: Tensor,
    gradient_offsets: Tensor,
    *,
    head: bool,
    columns: int,
    logit_scale: float,
    softcap: float | None,
    reverse: bool,
) -> None:
    rows = targets.numel()
    assert table.shape == (rows, TABLE_COLUMNS) and table.is_contiguous()
    assert coefficients.shape == (rows, 3) and coefficients.is_contiguous()
    assert gradient.stride(-1) == 1 or gradient.shape[-1] == 1
    if rows == 0:
        return
    given = GivenRows.of(logits, ref_logits)
    bias, ref_bias = both_biases(bias, ref_bias, given.has_reference)
    block, width = block_columns(given.has_reference, head), gradient.shape[-1]
    parts, blocks = parts_of(width, block)
    _gradient_kernel[(rows * parts,)](
        # A pointer that is not there is never read.
        *given[:4], table if bias is None else bias, table if ref_bias is None else ref_bias,
        targets, temperature, table, coefficients, gradient, gradient_offsets,
        columns, width, parts, blocks, float(logit_scale), float(softcap or 0.0), int(reverse),
        HAS_REF=given.has_reference, HEAD=head, HAS_BIAS=bias is not None,
        ALIGNED=given.aligned and is_aligned(gradient), BLOCK=block,
        num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip


def logit_gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    table: Tensor,
    coefficients: Tensor,
    gradient: Tensor,
    *,
    columns: int,
    reverse: bool,
) -> None:
    """Write the gradient of logits [..., V] over all of `gradient`, which may be the logits.

    table: of `logit_statistics`. coefficients [N, 3]: ∂L/∂logprob, ∂L/∂entropy, ∂L/∂kl. Rows whose
    three are 0 are not read, and get zeros like the columns from `columns` on.
    """
    assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
    _launch(
        logits, ref_logits, targets, None, None, temperature, table, coefficients,
        gradient, row_offsets(gradient),
        head=False, columns=columns, logit_scale=1.0, softcap=None, reverse=reverse,
    )  # fmt: skip


def row_gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    table: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    gradient: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    reverse: bool,
) -> None:
    """Write the gradient of a head's raw products [n, V] to rows slots[i] of gradient [m, V].

    table: of `row_statistics`. slots [n] int64: each at most once, and −1 for rows that have no
    place. `gradient` is memory of its own.
    """
    assert gradient.dim() == 2 and gradient.shape[1] == logits.shape[1]
    assert gradient.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr()
    _launch(
        logits, ref_logits, targets, bias, ref_bias, temperature, table, coefficients,
        gradient, slots * gradient.stride(0),
        head=True, columns=logits.shape[1], logit_scale=logit_scale, softcap=softcap,
        reverse=reverse,
    )  # fmt: skip


def variants(target: str) -> Iterator[Variant]:
    del target  # one configuration serves all
    for options in row_options():
        block = block_columns(options.constexprs["HAS_REF"], options.constexprs["HEAD"])
        # A head's gradient may be of another type than its logits, the logits' own is of theirs.
        results = TYPES if options.constexprs["HEAD"] else (options.dtype,)
        for aligned in (False, True):
            constexprs = {**options.constexprs, "ALIGNED": aligned, "BLOCK": block}
            words = f"{block} w{NUM_WARPS}{options.words}{' aligned' if aligned else ''}"
            for result in results:
                types = {**row_types(options), "gradient_ptr": TYPES[result]}
                yield variant(
                    _gradient_kernel, "row_gradient", f"{words} to {result}", options.dtype,
                    constexprs, types, NUM_WARPS,
                )  # fmt: skip
