"""The backward of a linear head in Triton: the logits again, as gradients, a slice at a time.

For a slice of the vocabulary a kernel recomputes the logits and stores ∂L/∂(W·h + b) (docs/math.md,
section 2) in the dtype of the operands, in fp16 scaled; two matrix products of the library turn it
into the hidden states' gradient, which accumulates in float32, and into the slice of the weight's,
which is written once. No buffer has the size of the weight or of the logits.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._head import HeadInputs, HeadOptions
from ._triton import Variant, own_gradient
from ._triton_head_tile import (
    DTYPES,
    REFERENCES,
    TILE_DIVISIBLE,
    HeadLaunch,
    head_tile,
    head_tiles,
    smallest_tile,
    strip_logits,
    strips,
    tile_constexprs,
    tile_of,
    tile_signature,
)  # fmt: skip
from ._triton_logits import rounded


@triton.jit(
    do_not_specialize=[
        "n", "columns", "first_column", "before", "softcap", "after_scale",
        "has_bias", "has_ref_bias", "reverse",
    ],
    do_not_specialize_on_alignment=[
        "bias_ptr", "ref_bias_ptr", "rows_ptr", "targets_ptr", "temperature_ptr", "table_ptr",
        "coefficients_ptr",
    ],
)  # fmt: skip
def _head_gradient(
    hidden_ptr, weight_ptr, bias_ptr, ref_hidden_ptr, ref_weight_ptr, ref_bias_ptr,
    rows_ptr, targets_ptr, temperature_ptr,
    n, columns, first_column, size, ref_size,
    stride_hidden, stride_weight, stride_ref_hidden, stride_ref_weight,
    before, softcap, after_scale, has_bias, has_ref_bias, reverse,
    table_ptr, coefficients_ptr, gradient_ptr, stride_gradient,
    REFERENCE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    UPCAST_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gradient [n, columns] of W·h + b from table [n, 8] and coefficients [n, 3]."""
    pid_m, pid_n = tile_of(n, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n
    row = tl.minimum(offs_m, n - 1).to(tl.int64)
    index = tl.load(rows_ptr + row)
    start = pid_n * BLOCK_N
    product, ref_product = head_tile(
        hidden_ptr, weight_ptr, bias_ptr, ref_hidden_ptr, ref_weight_ptr, ref_bias_ptr,
        index, start, columns, size, ref_size,
        stride_hidden, stride_weight, stride_ref_hidden, stride_ref_weight,
        has_bias, has_ref_bias, REFERENCE, BLOCK_N, BLOCK_K, UPCAST_DOT, PRECISION,
    )  # fmt: skip
    after = after_scale / tl.load(temperature_ptr + index)
    target = (tl.load(targets_ptr + index) - first_column - start).to(tl.int32)
    table_ptr += row * 8
    m, log_sum = tl.load(table_ptr), tl.load(table_ptr + 1)
    coefficients_ptr += row * 3
    on_target, on_entropy = tl.load(coefficients_ptr), tl.load(coefficients_ptr + 1)
    constant = -on_target - on_entropy * tl.load(table_ptr + 5)
    on_logprob = -on_entropy
    if REFERENCE != 0:
        ref_m, ref_log_sum = tl.load(table_ptr + 2), tl.load(table_ptr + 3)
        on_kl = tl.load(coefficients_ptr + 2)
        on_logprob += tl.where(reverse != 0, 0.0, on_kl)
        # A divergence of +∞ matters only where there is a coefficient.
        pull = tl.where(on_kl == 0.0, 0.0, -on_kl * tl.load(table_ptr + 6))
        constant += tl.where(reverse != 0, on_kl, pull)
    strip, ref_strip = strips(product), strips(ref_product)
    width: tl.constexpr = BLOCK_N // 4
    # Offsets inside a tile fit 32 bits, and take half the registers.
    gradient_ptr += pid_m.to(tl.int64) * BLOCK_M * stride_gradient + start
    row_offset = tl.arange(0, BLOCK_M) * stride_gradient
    for i in tl.static_range(4):
        offs = i * width + tl.arange(0, width)
        z = strip_logits(strip[i], before, after, softcap)
        ref_part = 0.0
        if REFERENCE != 0:
            ref_z = strip_logits(ref_strip[i], before, after, softcap)
            ref_logprob = (ref_z - ref_m[:, None]) - ref_log_sum[:, None]
            # A reference of −∞ matters only where there is a coefficient.
            unused = (on_kl[:, None] == 0.0) | (reverse != 0)
            ref_part = tl.where(unused, 0.0, -on_kl[:, None] * ref_logprob)
        g = own_gradient(
            z, m[:, None], log_sum[:, None], constant[:, None], on_logprob[:, None], ref_part
        )
        if REFERENCE != 0:
            if reverse != 0:
                ref_p = tl.exp(ref_logprob)
                g -= tl.where(on_kl[:, None] == 0.0, 0.0, on_kl[:, None] * ref_p)
        g += tl.where(offs[None, :] == target[:, None], on_target[:, None], 0.0)
        g *= before * after[:, None]
        if softcap != 0:
            slope = z / after[:, None]
            g *= 1.0 - slope * slope
        mask = mask_m[:, None] & (start + offs < columns)[None, :]
        out = gradient_ptr + (row_offset[:, None] + offs[None, :])
        tl.store(out, rounded(g, gradient_ptr.dtype.element_ty), mask=mask)


def float32_product(
    a: Tensor,
    b: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    alpha: float = 1.0,
) -> Tensor:
    """`out (+)= alpha * (a.float() @ b.float())` of one dtype; returns out [m, n].

    16-bit operands on a GPU go into the product as they are and are summed and kept in float32;
    float32 ones are rounded to TF32 where the process allows it, as in any product of torch.
    out: float32, allocated where it is None; accumulate adds to it.
    """
    if out is None:
        assert not accumulate
        out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    if a.dtype != torch.float32 and a.device.type == "cpu":
        a, b = a.float(), b.float()
    if accumulate and a.dtype == torch.float32:
        return torch.addmm(out, a, b, alpha=alpha, out=out)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, out=out)
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    return out if alpha == 1.0 else out.mul_(alpha)


def fp16_scale(coefficients: Tensor) -> float:
    """The power of two that brings the largest coefficient to between 2^7 and 2^8.

    fp16 ends at 2^16 and, with few bits left, at 2^−24: a gradient over the number of tokens times
    a probability is soon less. What multiplies a coefficient is rarely above 2^8.
    """
    exponent = math.frexp(float(coefficients.abs().amax()))[1]
    return 2.0 ** min(8 - exponent, 120)


def head_gradients(
    inputs: HeadInputs,
    rows: Tensor,
    options: HeadOptions,
    table: Tensor,
    coefficients: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂L/∂hidden [N, D], ∂L/∂weight [V, D], ∂L/∂bias [V], those that are needed, in their dtypes.

    table: of `head_statistics` for the same rows [n]. coefficients [n, 3] float32: ∂L/∂logprob,
    ∂L/∂entropy, ∂L/∂kl; rows where all three are 0 are better left out of `rows`. Without a KL term
    give inputs without ref_hidden: the reference is then not recomputed.
    Rows that are not in `rows` get 0, as do padded columns. Beside the results it holds a slice of
    options.workspace_bytes, at least one tile of the vocabulary wide, and [n, D] in float32.
    """
    head = HeadLaunch("gradient", inputs, options)
    n, tiles, vocab = rows.numel(), head.tiles, options.valid_vocab
    hidden, weight, bias = (
        torch.zeros_like(x, memory_format=torch.contiguous_format)
        if needed and x is not None
        else None
        for x, needed in zip(inputs[:3], needs, strict=True)
    )
    if n == 0 or (hidden is None and weight is None and bias is None):
        return hidden, weight, bias
    table, coefficients = table.contiguous(), coefficients.contiguous()
    size = inputs.hidden.shape[1]
    # A column of the vocabulary costs its gradient, its row of the weight's, and its copy.
    own_bytes = n * head.dtype.itemsize + 4 * size * needs[1] + head.copied_bytes
    step = head.columns_within(options.workspace_bytes, own_bytes)
    step = min(step, triton.cdiv(vocab, 16) * 16)
    gradient = torch.empty(n, step, dtype=head.dtype, device=rows.device)
    hidden_sum = torch.empty(n * needs[0], size, dtype=torch.float32, device=rows.device)
    weight_slice = torch.empty(step * needs[1], size, dtype=torch.float32, device=rows.device)
    gathered = head.hidden.index_select(0, rows) if needs[1] else head.hidden
    scale = fp16_scale(coefficients) if head.dtype == torch.float16 else 1.0
    if scale != 1.0:
        coefficients = coefficients * scale
    for span in head.spans(step):
        grid = (triton.cdiv(n, tiles.block_m) * triton.cdiv(span.columns, tiles.block_n),)
        _head_gradient[grid](
            *head.arguments(span, rows), table, coefficients, gradient, step,
            **head.constexprs, **head.launch,
        )  # fmt: skip
        g = gradient[:, : span.columns]
        place = slice(span.start, span.start + span.columns)
        if hidden is not None:
            float32_product(
                g, span.weight, out=hidden_sum, accumulate=span.start > 0, alpha=1 / scale
            )
        if weight is not None:
            out = weight_slice[: span.columns]
            weight[place] = float32_product(g.t(), gathered, out=out, alpha=1 / scale)
        if bias is not None:
            bias[place] = g.sum(0, dtype=torch.float32).mul_(1 / scale)
    if hidden is not None:
        hidden.index_copy_(0, rows, hidden_sum.to(hidden.dtype))
    return hidden, weight, bias


def variants(target: str) -> Iterator[Variant]:
    """Every compilation of this module's kernel that a launch on `target` can ask for."""
    for dtype, reference, tiles in head_tiles("gradient", target):
        yield Variant(
            _head_gradient, "head_gradient", tiles.describe(REFERENCES[reference]), dtype,
            tile_signature(dtype)
            | dict.fromkeys(("table_ptr", "coefficients_ptr"), "*fp32")
            | {"gradient_ptr": f"*{dtype}", "stride_gradient": "i32"},
            tile_constexprs(target, DTYPES[dtype], reference, tiles),
            tiles.num_warps, tiles.num_stages, True,
            (*TILE_DIVISIBLE, "gradient_ptr", "stride_gradient"),
            smallest_tile(target, dtype, reference),
        )  # fmt: skip
