"""Kernels that `xray` is tried on: sound ones, and one for each rule that breaks just that rule."""

from collections.abc import Iterator

import triton
import triton.language as tl

from fastrlhf_kernels._triton import Variant


@triton.jit
def row_maximum_kernel(x_ptr, out_ptr, V, stride, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([BLOCK_V], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + row * stride + offs, mask=offs < V, other=float("-inf"))
        top = tl.maximum(top, x.to(tl.float32))
    tl.store(out_ptr + row, tl.max(top, 0))


@triton.jit
def product_maximum_kernel(
    hidden_ptr, weight_ptr, out_ptr, N, V, D, temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest tempered logit of each row in each tile of the vocabulary."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = (pid // tiles_n) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        h = tl.load(
            hidden_ptr + offs_n[:, None] * D + offs_d[None, :],
            mask=(offs_n[:, None] < N) & (offs_d[None, :] < D), other=0.0,
        )  # fmt: skip
        w = tl.load(
            weight_ptr + offs_v[:, None] * D + offs_d[None, :],
            mask=(offs_v[:, None] < V) & (offs_d[None, :] < D), other=0.0,
        )  # fmt: skip
        z = tl.dot(h, tl.trans(w), z, input_precision=PRECISION)
    z = tl.where(offs_v[None, :] < V, z / temperature, float("-inf"))
    tl.store(out_ptr + (pid // tiles_n) * N + offs_n, tl.max(z, 1), mask=offs_n < N)


def product(
    name: str, n: int, v: int, d: int, warps: int, stages: int, dtype: str = "bf16"
) -> Variant:
    return Variant(
        product_maximum_kernel, name, f"{n}x{v}x{d} w{warps} s{stages}", dtype,
        dict(
            hidden_ptr=f"*{dtype}", weight_ptr=f"*{dtype}", out_ptr="*fp32",
            N="i32", V="i32", D="i32", temperature="fp32",
            BLOCK_N="constexpr", BLOCK_V="constexpr", BLOCK_D="constexpr", PRECISION="constexpr",
        ),
        dict(BLOCK_N=n, BLOCK_V=v, BLOCK_D=d, PRECISION="ieee"), warps, stages, True,
        ("hidden_ptr", "weight_ptr", "out_ptr", "D"),
    )  # fmt: skip


def variants(target: str) -> Iterator[Variant]:
    yield Variant(
        row_maximum_kernel, "row_maximum", "1024 w4", "bf16",
        dict(x_ptr="*bf16", out_ptr="*fp32", V="i32", stride="i64", BLOCK_V="constexpr"),
        dict(BLOCK_V=1024), 4, 1, False, ("x_ptr", "stride"),
    )  # fmt: skip
    yield product("product", 128, 128, 64, 8, 3)
    yield product("spilling_product", 256, 256, 32, 4, 2)
    yield product("wide_product", 128, 128, 256, 8, 3)
    yield product("narrow_product", 64, 64, 32, 2, 2)
    yield product("exact_product", 32, 32, 16, 4, 2, "fp32")
    yield product("unsaid_product", 64, 64, 32, 4, 2)._replace(matrix=False)
    yield product("broken_product", 48, 64, 32, 4, 2)
