"""How Triton kernels read rows of logits that lie in memory, and which rows there can be.

Rows start at any offset and hold fp32, bf16 or fp16; those of a head's product (HEAD) get bias,
scale and soft cap on the way. Formulas: docs/math.md, section 1.
"""

import inspect
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._records import row_offsets
from ._triton import INTERPRETED, Variant, tempered

PART_COLUMNS = 16_384
NUM_WARPS = 4


CUTS = tl.constexpr(INTERPRETED)
SMALLEST = tl.constexpr(2.0**-126)
"""normal number"""


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in another type, to the nearest and then to the even one."""
    if CUTS and dtype == tl.bfloat16:
        # The interpreter cuts the last 16 bits off: half of what they count is added before.
        bits = tl.where(tl.abs(x) < SMALLEST, 0.0, x).to(tl.int32, bitcast=True)
        half = tl.where(bits == 0, 0, 0x7FFF + ((bits >> 16) & 1))
        x = (bits + half).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _capped(z, bias, logit_scale, softcap):
    """The head's logits before the temperature; no cap where it is 0."""
    if softcap > 0.0:
        z = tempered(z, bias, logit_scale, softcap, 1.0, True)
    else:
        z = tempered(z, bias, logit_scale, softcap, 1.0, False)
    return z


@triton.jit
def logits_block(
    row_ptr, bias_ptr, offs, columns, mask, logit_scale, softcap,
    HEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits before the temperature; −inf from `columns` on."""
    z = tl.load(row_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
    if HEAD:
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs, mask=offs < columns, other=0.0)
        z = _capped(z, bias, logit_scale, softcap)
    return tl.where(offs < columns, z, float("-inf"))


@triton.jit
def target_logit(
    logits_ptr, offsets_ptr, bias_ptr, row, target, columns, mask, logit_scale, softcap,
    HEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The logit of each row's target; NaN for one outside the vocabulary, which is not read."""
    there = (target >= 0) & (target < columns)
    mask = mask & there
    offset = tl.load(offsets_ptr + row, mask=mask, other=0)
    z = tl.load(logits_ptr + offset + target, mask=mask, other=0.0).to(tl.float32)
    if HEAD:
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + target, mask=mask, other=0.0)
        z = _capped(z, bias, logit_scale, softcap)
    return tl.where(there, z, float("nan"))


@triton.jit
def row_start(ptr, offsets_ptr, row, ALIGNED: tl.constexpr):
    row_ptr = ptr + tl.load(offsets_ptr + row)
    if ALIGNED:
        row_ptr = tl.multiple_of(row_ptr, 16)  # bytes
    return row_ptr


def block_columns(has_reference: bool, head: bool) -> int:
    """Numbers of a row held at a time: 16 a thread, 8 or 4 where there is more to hold."""
    return 2048 >> (has_reference + head)


def parts_of(columns: int, block: int) -> tuple[int, int]:
    """Into how many parts a row is cut, and how many blocks each has."""
    blocks = triton.cdiv(columns, block)
    parts = triton.cdiv(columns, PART_COLUMNS)
    blocks_a_part = triton.cdiv(blocks, parts)
    return triton.cdiv(blocks, blocks_a_part), blocks_a_part


def is_aligned(x: Tensor) -> bool:
    """Whether every row starts at, and is as long as, a multiple of 16 numbers."""
    strides = (stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    whole = all(stride % 16 == 0 for stride in list(strides)[:-1])
    return whole and x.shape[-1] % 16 == 0 and x.data_ptr() % 16 == 0


class GivenRows(NamedTuple):
    """Rows of logits, and of a reference, for a launch."""

    logits: Tensor
    offsets: Tensor
    ref_logits: Tensor
    ref_offsets: Tensor
    has_reference: bool
    aligned: bool

    @classmethod
    def of(cls, logits: Tensor, ref_logits: Tensor | None) -> "GivenRows":
        given = [x for x in (logits, ref_logits) if x is not None]
        assert all(x.shape == logits.shape for x in given)
        assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in given)
        if given[-1].dtype != logits.dtype:
            # Pairs of types that hardly occur are not worth their own kernels.
            given[-1] = given[-1].float()
        offsets = [row_offsets(x) for x in given]
        aligned = all(is_aligned(x) for x in given)
        return cls(logits, offsets[0], given[-1], offsets[-1], ref_logits is not None, aligned)


def both_biases(
    bias: Tensor | None, ref_bias: Tensor | None, has_reference: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Either none, or one for each of the policy and its reference."""
    if has_reference and bias is None and ref_bias is not None:
        return torch.zeros_like(ref_bias), ref_bias
    if has_reference and bias is not None and ref_bias is None:
        return bias, torch.zeros_like(bias)
    return bias, ref_bias


TYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}


class RowOptions(NamedTuple):
    """What tells the compilations of a kernel that reads rows apart."""

    dtype: str
    ref_dtype: str | None
    constexprs: dict[str, bool]

    @property
    def words(self) -> str:
        names = [name.lower().removeprefix("has_") for name, on in self.constexprs.items() if on]
        words = [*names, *([f"of {self.ref_dtype}"] if self.ref_dtype else [])]
        return "".join(f" {word}" for word in words)


def row_options() -> Iterator[RowOptions]:
    """Every combination that the ops can ask for."""
    for dtype, ref_dtype in product(TYPES, (None, *TYPES)):
        if ref_dtype in (None, dtype, "fp32"):
            given = {"HAS_REF": ref_dtype is not None, "HEAD": False, "HAS_BIAS": False}
            yield RowOptions(dtype, ref_dtype, given)
    for has_reference, has_bias in product((False, True), (False, True)):
        given = {"HAS_REF": has_reference, "HEAD": True, "HAS_BIAS": has_bias}
        yield RowOptions("fp32", "fp32" if has_reference else None, given)


def row_types(options: RowOptions) -> dict[str, str]:
    """Triton types of a row kernel's arguments, as `variant` takes them."""
    return {
        "offsets_ptr": "*i64", "ref_offsets_ptr": "*i64", "targets_ptr": "*i64",
        "gradient_offsets_ptr": "*i64", "logit_scale": "fp32", "softcap": "fp32",
        "logits_ptr": TYPES[options.dtype],
        "ref_logits_ptr": TYPES[options.ref_dtype or options.dtype],
        # Without rows to skip there is a pointer to something else.
        "used_ptr": "*fp32" if options.constexprs["HEAD"] else "*i1",
    }  # fmt: skip


def variant(
    kernel: Any,
    name: str,
    config: str,
    dtype: str,
    constexprs: Mapping[str, Any],
    types: Mapping[str, str],
    num_warps: int,
) -> Variant:
    """A variant whose pointers are float32 and numbers int32 where `types` has no other."""
    signature = {}
    for argument in inspect.signature(kernel.fn).parameters:
        usual = "*fp32" if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constexprs else types.get(argument, usual)
    return Variant(
        kernel, name, config, dtype, signature, dict(constexprs), num_warps, 1, matrix=False
    )
