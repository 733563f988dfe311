"""What the Triton kernels share: the formulas of one logit, and the record of what can be compiled.

Imported only where the `triton` backend runs (or `xray` compiles), so that the package works where
Triton is not installed. Formulas: docs/math.md, sections 1 and 2. Under TRITON_INTERPRET=1, which
is read when the kernels are defined, they run on CPU tensors.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""what every kernel is compiled for by `xray`"""


class Variant(NamedTuple):
    """One compilation of one kernel; every kernel module lists its own in `variants(target)`."""

    kernel: Any
    """the jitted function"""
    name: str
    """the kernel's name, without leading underscores"""
    config: str
    """what distinguishes it among those of its kernel and dtype: "128x128x64 w8 s3 ref softcap" """
    dtype: str
    """of the numbers that dominate: "bf16", "fp16", "fp32" """
    signature: Mapping[str, str]
    """argument -> Triton type ("*bf16", "i64", "fp32", "constexpr")"""
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool
    """a matrix product: it has to compile to matrix instructions"""
    divisible: tuple[str, ...] = ()
    """arguments that are multiples of 16 in practice, which a launch compiles for"""
    smallest_tile: tuple[int, int] = (128, 128)
    """what a matrix product may not go below on sm_80 to sm_100"""

    @property
    def attrs(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """What ASTSource takes to compile as such a launch does."""
        names = self.kernel.arg_names
        return {(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible}


def target_of(device: torch.device) -> str:
    """The entry of `TARGETS` whose configurations a device uses."""
    if device.type != "cuda" or INTERPRETED:
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = [t for t in TARGETS if t.startswith("sm_") and int(t[3:]) <= 10 * major + minor]
    return max(known, key=lambda t: int(t[3:])) if known else "sm_80"


@triton.jit
def tempered(z, bias, logit_scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """softcap·tanh(logit_scale·(z + bias) / softcap) / temperature, in float32."""
    z = (z + bias) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z / temperature


@triton.jit
def tanh(x):
    """Within 3 ulp: a polynomial near 0, where 1 − 2/(e^2x + 1) would cancel."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = p * z * x + x
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def base(m):
    """What to subtract from logits: their maximum, or 0 while every column is masked (−inf)."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def exp_and_moment(z, b):
    """e^(z − b) and e^(z − b)·(z − b); 0 and 0 for a masked column, not 0·(−inf)."""
    shifted = z - b
    e = tl.exp(shifted)
    return e, tl.where(e == 0.0, 0.0, e * shifted)


@triton.jit
def shifted_cross(g, s, m, ref_m, top, ref_top):
    """Σ e·((z − m) − (zʳ − mʳ)) moved to the maxima `top` and `ref_top` of a larger set."""
    shift = (base(m) - base(top)) - (base(ref_m) - base(ref_top))
    return (g + s * shift) * tl.exp(m - base(top))


@triton.jit
def own_gradient(z, m, log_sum, constant, on_logprob, ref_part):
    """P·(A + B·ℓ + ref_part), with ref_part = C·ℓʳ or 0; 0 where P is 0."""
    logprob = (z - m) - log_sum
    p = tl.exp(logprob)
    return tl.where(p == 0.0, 0.0, p * (constant + on_logprob * logprob + ref_part))
