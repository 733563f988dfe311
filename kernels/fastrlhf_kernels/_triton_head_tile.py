"""One tile of a head's logits in Triton: its product, its transformation, and how it is launched.

Both directions start from the same tile: [BLOCK_M rows] × [BLOCK_N columns] in float32, computed
over the hidden size, for the policy and, with one more product, for the reference. A head with
operands of several dtypes is computed in float32, and its weight is raised to it a slice of the
vocabulary at a time, like one whose rows are not contiguous; such a slice is a copy that counts
towards the workspace.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._head import HeadInputs, HeadOptions
from ._triton import INTERPRETED, tanh, target_of

NO_REFERENCE, SHARED_HEAD, OWN_HEAD = 0, 1, 2
REFERENCES = ("none", "shared", "separate")
SHARING = (torch.bfloat16, torch.float16)
"""where two products share the loads of one weight; float32 operands leave no registers for that"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@triton.jit
def tile_of(n, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """GROUP_M tiles of rows pass over the vocabulary together and share its tiles in the cache."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(n, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def one_product(
    hidden_ptr, weight_ptr, bias, index, column, size, stride_hidden, stride_weight,
    BLOCK_K: tl.constexpr, UPCAST_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[index] @ weight[column].T + bias."""
    offs_k = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden_ptr + index[:, None] * stride_hidden + offs_k[None, :]
    weight_ptrs = weight_ptr + column[None, :] * stride_weight + offs_k[:, None]
    total = tl.zeros((index.shape[0], column.shape[0]), tl.float32) + bias[None, :]
    if hidden_ptr.dtype.element_ty == tl.float32:
        # Without a way around the loop, its sums take no registers beside what they start from.
        tl.assume(size > 0)
    for k in range(0, size, BLOCK_K):
        mask_k = offs_k < size - k
        h = tl.load(hidden_ptrs, mask=mask_k[None, :], other=0.0)
        w = tl.load(weight_ptrs, mask=mask_k[:, None], other=0.0)
        if UPCAST_DOT:
            h, w = h.to(tl.float32), w.to(tl.float32)
        total = tl.dot(h, w, total, input_precision=PRECISION)
        hidden_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    return total


@triton.jit
def two_products(
    hidden_ptr, ref_hidden_ptr, weight_ptr, bias, index, column, size,
    stride_hidden, stride_ref_hidden, stride_weight,
    BLOCK_K: tl.constexpr, UPCAST_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`one_product` of each of two hidden states with one weight, which is loaded once."""
    offs_k = tl.arange(0, BLOCK_K)
    hidden_ptrs = hidden_ptr + index[:, None] * stride_hidden + offs_k[None, :]
    ref_ptrs = ref_hidden_ptr + index[:, None] * stride_ref_hidden + offs_k[None, :]
    weight_ptrs = weight_ptr + column[None, :] * stride_weight + offs_k[:, None]
    total = tl.zeros((index.shape[0], column.shape[0]), tl.float32) + bias[None, :]
    ref_total = total
    for k in range(0, size, BLOCK_K):
        mask_k = offs_k < size - k
        h = tl.load(hidden_ptrs, mask=mask_k[None, :], other=0.0)
        r = tl.load(ref_ptrs, mask=mask_k[None, :], other=0.0)
        w = tl.load(weight_ptrs, mask=mask_k[:, None], other=0.0)
        if UPCAST_DOT:
            h, r, w = h.to(tl.float32), r.to(tl.float32), w.to(tl.float32)
        total = tl.dot(h, w, total, input_precision=PRECISION)
        ref_total = tl.dot(r, w, ref_total, input_precision=PRECISION)
        hidden_ptrs += BLOCK_K
        ref_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    return total, ref_total


@triton.jit
def head_tile(
    hidden_ptr, weight_ptr, bias_ptr, ref_hidden_ptr, ref_weight_ptr, ref_bias_ptr,
    index, start, columns, size, ref_size,
    stride_hidden, stride_weight, stride_ref_hidden, stride_ref_weight, has_bias, has_ref_bias,
    REFERENCE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W·h + b of rows `index` and BLOCK_N columns from `start` on, for policy and reference.

    The bias is what the sums start from: it then takes no registers where the logits are reduced.
    Columns that are not there repeat the last one, so that the loads need no mask for them.
    """
    column = tl.minimum(start + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
    bias = tl.load(bias_ptr + column, mask=column < has_bias * columns, other=0.0)
    if REFERENCE == 1:
        product, ref_product = two_products(
            hidden_ptr, ref_hidden_ptr, weight_ptr, bias, index, column, size,
            stride_hidden, stride_ref_hidden, stride_weight, BLOCK_K, UPCAST_DOT, PRECISION,
        )  # fmt: skip
    else:
        product = one_product(
            hidden_ptr, weight_ptr, bias, index, column, size,
            stride_hidden, stride_weight, BLOCK_K, UPCAST_DOT, PRECISION,
        )  # fmt: skip
        ref_product = product
    if REFERENCE == 2:
        if hidden_ptr.dtype.element_ty == tl.float32:
            # By `column`, the addresses would take registers beside the first product.
            offs = tl.arange(0, BLOCK_N)
            mask = offs < has_ref_bias * columns - start
            bias = tl.load(ref_bias_ptr + start + offs, mask=mask, other=0.0)
        else:
            mask = column < has_ref_bias * columns
            bias = tl.load(ref_bias_ptr + column, mask=mask, other=0.0)
        ref_product = one_product(
            ref_hidden_ptr, ref_weight_ptr, bias, index, column, ref_size,
            stride_ref_hidden, stride_ref_weight, BLOCK_K, UPCAST_DOT, PRECISION,
        )  # fmt: skip
    return product, ref_product


@triton.jit
def halves(x):
    """The left and the right columns of a tile."""
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute(0, 2, 1).split()


@triton.jit
def strips(x):
    """A tile as four strips of columns: what is done to one after the other needs few registers."""
    left, right = halves(x)
    return halves(left) + halves(right)


@triton.jit
def strip_logits(product, before, after, softcap):
    """tanh(before·product)·after, or without the tanh where there is no soft cap."""
    x = product * before
    if softcap != 0:
        x = tanh(x)
    return x * after[:, None]


@triton.jit
def at_most(x, bound):
    """A comparison that NaN fails, so that it stays visible."""
    return tl.where(x > bound, bound, x)


@triton.jit
def at_least(x, bound):
    return tl.where(x < bound, bound, x)


class Span(NamedTuple):
    """Columns of the vocabulary, in the dtype to compute in, rows of the weight contiguous."""

    start: int
    columns: int
    weight: Tensor  # [columns, D]
    ref_weight: Tensor | None  # [columns, D']


def _unit_stride(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.detach().to(dtype)
    return x if _unit_stride(x) else x.contiguous()


class HeadLaunch:
    """What the launches of one kernel over one head have in common."""

    def __init__(self, kernel: str, inputs: HeadInputs, options: HeadOptions) -> None:
        self.options, self.weight, self.ref_weight = options, inputs.weight, inputs.ref_weight
        self.targets = inputs.targets.contiguous()
        self.temperature = inputs.temperature.contiguous()
        operands = (inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight)
        dtypes = {x.dtype for x in operands if x is not None}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        weights = [x for x in (inputs.weight, inputs.ref_weight) if x is not None]
        self.direct = all(x.dtype == self.dtype and _unit_stride(x) for x in weights)
        # Of the workspace, for a column of the vocabulary.
        width = 0 if self.direct else sum(x.shape[1] for x in weights)
        self.copied_bytes = width * self.dtype.itemsize
        self.reference = NO_REFERENCE
        if inputs.ref_hidden is not None:
            shared = inputs.ref_weight is None and self.dtype in SHARING
            self.reference = SHARED_HEAD if shared else OWN_HEAD
        self.hidden = _prepared(inputs.hidden, self.dtype)
        self.ref_hidden = (
            self.hidden if inputs.ref_hidden is None else _prepared(inputs.ref_hidden, self.dtype)
        )
        self.bias, self.ref_bias = (
            None if x is None else x.detach().float().contiguous()
            for x in (inputs.bias, inputs.bias if inputs.ref_weight is None else inputs.ref_bias)
        )
        target = target_of(inputs.hidden.device)
        reference = REFERENCES[self.reference]
        self.tiles = _tuned.tiles("head", kernel, target, self.dtype, reference)
        self.constexprs = tile_constexprs(target, self.dtype, self.reference, self.tiles)
        self.launch = {"num_warps": self.tiles.num_warps, "num_stages": self.tiles.num_stages}

    @property
    def reverse(self) -> int:
        return int(self.options.kl_direction == "reverse")

    def columns_within(self, size: int, bytes_per_column: int) -> int:
        """How many columns, in whole tiles and at least one, fit `size` bytes."""
        tiles = size // max(1, bytes_per_column * self.tiles.block_n)
        return max(1, tiles) * self.tiles.block_n

    def spans(self, step: int) -> Iterator[Span]:
        vocab = self.options.valid_vocab
        for start in range(0, vocab, step):
            stop = min(vocab, start + step)
            weight, ref_weight = (
                None if x is None else _prepared(x[start:stop], self.dtype)
                for x in (self.weight, self.ref_weight)
            )
            assert weight is not None
            yield Span(start, stop - start, weight, ref_weight)

    def arguments(self, span: Span, rows: Tensor) -> tuple[Any, ...]:
        """Those that `_head_partials` and `_head_gradient` start with."""
        hidden, ref_hidden, weight = self.hidden, self.ref_hidden, span.weight
        ref_weight = weight if span.ref_weight is None else span.ref_weight
        softcap = self.options.softcap
        scale = float(softcap or 1.0)
        bias, ref_bias = (
            self.temperature if x is None else x[span.start :] for x in (self.bias, self.ref_bias)
        )
        return (
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias,
            rows.contiguous(), self.targets, self.temperature,
            rows.numel(), span.columns, span.start, weight.shape[1], ref_weight.shape[1],
            hidden.stride(0), weight.stride(0), ref_hidden.stride(0), ref_weight.stride(0),
            float(self.options.logit_scale / scale), float(softcap or 0.0), scale,
            int(self.bias is not None), int(self.ref_bias is not None), self.reverse,
        )  # fmt: skip


def head_tiles(kernel: str, target: str) -> Iterator[tuple[str, int, _tuned.Tiles]]:
    """dtype, reference and tiles of every launch of `kernel` that there can be."""
    for name, dtype in DTYPES.items():
        for reference, words in enumerate(REFERENCES):
            if reference != SHARED_HEAD or dtype in SHARING:
                yield name, reference, _tuned.tiles("head", kernel, target, dtype, words)


def smallest_tile(target: str, dtype: str, reference: int) -> tuple[int, int]:
    """float32 products are three TF32 products each: two of 128 × 128 spill, and so does one on the
    targets with the least shared memory."""
    narrow = dtype == "fp32" and (reference or target in ("sm_86", "sm_89"))
    return (128, 64) if narrow else (128, 128)


def tile_constexprs(
    target: str, dtype: torch.dtype, reference: int, tiles: _tuned.Tiles
) -> dict[str, Any]:
    """float32 products keep float32's accuracy: three TF32 products on NVIDIA's matrix units."""
    native = INTERPRETED or target.startswith("gfx")
    return {
        "REFERENCE": reference, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m,
        "UPCAST_DOT": INTERPRETED and dtype != torch.float32,
        "PRECISION": "ieee" if native else "tf32x3",
    }  # fmt: skip


def tile_signature(dtype: str) -> dict[str, str]:
    """Triton types of what `HeadLaunch.arguments` gives, for a dtype of DTYPES."""
    operands = ("hidden_ptr", "weight_ptr", "ref_hidden_ptr", "ref_weight_ptr")
    indices = ("rows_ptr", "targets_ptr")
    numbers = ("bias_ptr", "ref_bias_ptr", "temperature_ptr")
    scalars = ("before", "softcap", "after_scale")
    integers = (
        "n", "columns", "first_column", "size", "ref_size", "stride_hidden", "stride_weight",
        "stride_ref_hidden", "stride_ref_weight", "has_bias", "has_ref_bias", "reverse",
    )  # fmt: skip
    return (
        dict.fromkeys(operands, f"*{dtype}") | dict.fromkeys(indices, "*i64")
        | dict.fromkeys(numbers, "*fp32") | dict.fromkeys(scalars, "fp32")
        | dict.fromkeys(integers, "i32")
    )  # fmt: skip


TILE_DIVISIBLE = (
    "hidden_ptr", "weight_ptr", "ref_hidden_ptr", "ref_weight_ptr", "size", "ref_size",
    "stride_hidden", "stride_weight", "stride_ref_hidden", "stride_ref_weight",
)  # fmt: skip
"""multiples of 16 in every real head; what is not (a D of 1) compiles anew"""
