"""AdamW's step with block-wise 8-bit moments, in one sweep: some 16 bytes of traffic a number.

The same operations in the same order as `_reference_adamw8bit`, each rounded by itself: the kernel
is compiled without contraction into fma, and with exact division and square root.
"""

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._backend import TRITON_DEVICES
from ._reference_adamw8bit import BLOCK, AdamWStep, Moments, dynamic_map, pieces
from ._triton import INTERPRETED, Variant

# Blocks of 256 numbers a program, and its warps.
ROWS, NUM_WARPS = 4, 4


@triton.jit
def nearest_rank(size, PIECES: tl.constexpr):
    """The rank among the codes ≥ 0 of sizes in [0, 1], in float32."""
    slope = tl.full(size.shape, PIECES[0][1], tl.float32)
    offset = tl.full(size.shape, PIECES[0][2], tl.float32)
    most = tl.full(size.shape, PIECES[0][3], tl.float32)
    for i in tl.static_range(1, 8):
        above = size > PIECES[i][0]
        slope = tl.where(above, PIECES[i][1], slope)
        offset = tl.where(above, PIECES[i][2], offset)
        most = tl.where(above, PIECES[i][3], most)
    rank = tl.maximum(tl.minimum(size * slope + offset, most), 1.0)
    return tl.where(size > PIECES[0][0], rank, 0.0)


@triton.jit
def block_scale(x):
    """max |x| of each row, NaN where there is one: as integers, NaN is above infinity."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def sizes(x, scale):
    """|x| / scale, and 0 where that is NaN or the scale subnormal."""
    SMALLEST_NORMAL: tl.constexpr = 1.1754943508222875e-38
    normal = scale >= SMALLEST_NORMAL
    inverse = tl.where(normal, tl.div_rn(1.0, tl.where(normal, scale, 1.0)), 0.0)
    size = tl.abs(x) * inverse[:, None]
    return tl.where(size > 0.0, size, 0.0)


@triton.jit
def random_bits(index, key_low, key_high):
    """A hash of the key and the index modulo 2^32: `_reference_adamw8bit.random_bits`."""
    x = index.to(tl.uint32) + key_low.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D + key_high.to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["size", "key_low", "key_high"])
def _adamw_kernel(
    parameter_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    first_scale_ptr,
    second_scale_ptr,
    maps_ptr,
    size,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,
    step_size,
    root_correction,
    key_low,
    key_high,
    SIGNED: tl.constexpr,
    UNSIGNED: tl.constexpr,
    CODED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs_block = pid * ROWS + tl.arange(0, ROWS)
    offs = offs_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offs < size
    mask_block = offs_block * BLOCK < size

    p = tl.load(parameter_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradient_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if CODED:
        first_codes = tl.load(first_ptr + offs, mask=mask, other=127).to(tl.int32)
        second_codes = tl.load(second_ptr + offs, mask=mask, other=0).to(tl.int32)
        first_scale = tl.load(first_scale_ptr + offs_block, mask=mask_block, other=0.0)
        second_scale = tl.load(second_scale_ptr + offs_block, mask=mask_block, other=0.0)
        first = tl.load(maps_ptr + first_codes) * first_scale[:, None]
        second = tl.load(maps_ptr + 256 + second_codes) * second_scale[:, None]
    else:
        first = tl.load(first_ptr + offs, mask=mask, other=0.0)
        second = tl.load(second_ptr + offs, mask=mask, other=0.0)

    first = first * beta1 + g * one_minus_beta1
    second = second * beta2 + g * g * one_minus_beta2
    denominator = tl.sqrt_rn(second) * root_correction + eps
    p = p * decay - tl.div_rn(first, denominator) * step_size

    if STOCHASTIC:
        bits = random_bits(offs, key_low, key_high) & 0xFFFF
        rounded = ((p.to(tl.uint32, bitcast=True) + bits) >> 16).to(tl.uint16)
        rounded = tl.where(p != p, 0x7FC0, rounded).to(tl.uint16)
        tl.store(parameter_ptr + offs, rounded.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(parameter_ptr + offs, p.to(parameter_ptr.dtype.element_ty), mask=mask)
    if CODED:
        # Numbers past the end are 0 and do not raise the scale.
        first_scale, second_scale = block_scale(first), block_scale(second)
        code = nearest_rank(sizes(first, first_scale), SIGNED).to(tl.int32)
        code = tl.where(first < 0.0, 127 - tl.minimum(code, 127), 127 + code)
        tl.store(first_ptr + offs, code.to(tl.uint8), mask=mask)
        code = nearest_rank(sizes(second, second_scale), UNSIGNED).to(tl.int32)
        tl.store(second_ptr + offs, code.to(tl.uint8), mask=mask)
        tl.store(first_scale_ptr + offs_block, first_scale, mask=mask_block)
        tl.store(second_scale_ptr + offs_block, second_scale, mask=mask_block)
    else:
        tl.store(first_ptr + offs, first, mask=mask)
        tl.store(second_ptr + offs, second, mask=mask)


@cache
def _maps(device: torch.device) -> Tensor:
    """Both maps [2, 256], the signed one first."""
    return torch.stack([dynamic_map(True), dynamic_map(False)]).to(device)


def adamw_step(parameter: Tensor, gradient: Tensor, moments: Moments, step: AdamWStep) -> None:
    """`_reference_adamw8bit.adamw_step`, to the same bits."""
    size = parameter.numel()
    coded, stochastic = moments.first_scale is not None, step.key is not None
    assert gradient.shape == parameter.shape == (size,)
    for x in (parameter, gradient, moments.first, moments.second):
        assert x.is_contiguous() and x.numel() == size
        assert x.device.type in TRITON_DEVICES or INTERPRETED
    if not size:
        return
    key = step.key or 0
    with torch.cuda.device_of(parameter):
        _adamw_kernel[(triton.cdiv(size, ROWS * BLOCK),)](
            parameter, gradient, moments.first, moments.second,
            moments.first_scale if coded else parameter,
            moments.second_scale if coded else parameter, _maps(parameter.device), size,
            step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2, step.eps, step.decay,
            step.step_size, step.root_correction, _signed(key), _signed(key >> 32),
            SIGNED=pieces(True), UNSIGNED=pieces(False), CODED=coded, STOCHASTIC=stochastic,
            ROWS=ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _signed(word: int) -> int:
    """The low 32 bits as the int32 of the same bits, so that every key has one type."""
    word &= 0xFFFFFFFF
    return word - (word >> 31 << 32)


def _variant(dtype: str, gradient_dtype: str, coded: bool, stochastic: bool) -> Variant:
    state, scale = ("*u8", "*fp32") if coded else ("*fp32", f"*{dtype}")
    signature = {
        "parameter_ptr": f"*{dtype}", "gradient_ptr": f"*{gradient_dtype}", "first_ptr": state,
        "second_ptr": state, "first_scale_ptr": scale, "second_scale_ptr": scale,
        "maps_ptr": "*fp32", "size": "i32", "beta1": "fp32", "one_minus_beta1": "fp32",
        "beta2": "fp32", "one_minus_beta2": "fp32", "eps": "fp32", "decay": "fp32",
        "step_size": "fp32", "root_correction": "fp32", "key_low": "i32", "key_high": "i32",
    }  # fmt: skip
    constexprs = {
        "SIGNED": pieces(True), "UNSIGNED": pieces(False), "CODED": coded,
        "STOCHASTIC": stochastic, "ROWS": ROWS, "BLOCK": BLOCK,
    }  # fmt: skip
    words = [f"{ROWS}x{BLOCK}", f"w{NUM_WARPS}", "8bit" if coded else "float"]
    words += [f"grad-{gradient_dtype}"] if gradient_dtype != dtype else []
    words += ["stochastic"] if stochastic else []
    return Variant(
        kernel=_adamw_kernel,
        name="adamw_kernel",
        config=" ".join(words),
        dtype=dtype,
        signature=signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=NUM_WARPS,
        num_stages=3,
        matrix=False,
    )


def variants(target: str) -> Iterator[Variant]:
    """Every dtype of parameter and gradient, both kinds of state and of rounding."""
    for dtype in ("fp32", "bf16", "fp16"):
        for gradient_dtype in dict.fromkeys((dtype, "fp32")):
            for coded in (True, False):
                yield _variant(dtype, gradient_dtype, coded, stochastic=False)
                if dtype == "bf16":
                    yield _variant(dtype, gradient_dtype, coded, stochastic=True)
