"""Generalised advantage estimation and masked whitening.

One sweep over the tokens with `cpu`, one launch with `triton`; elsewhere, and under torch.compile,
plain torch: T steps on [B] vectors. Formulas: docs/math.md, sections 4 and 5.2.
Deviation from Schulman et al. 2016: tokens masked out inside a sequence are skipped, so that the
token before them bootstraps from the token after them.
"""

import math

import torch
from torch import Tensor

from . import _cpu_tokens, reference
from ._backend import check_mask, check_same_shape, compute_dtype, describe, resolve


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`A_t = r_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1}`; `returns = A + V`.

    rewards, values, mask: [B, T], mask bool. Returns (advantages, returns), both [B, T], float32
    (float64 for float64 inputs), without gradient, 0 where mask is False. The value after a
    sequence's last valid token is 0. Masked entries are never read.

    Raises ValueError for other ranks and shapes, and for gamma or lam outside [0, 1].
    Source: Schulman et al. 2016, eq. 16; docs/math.md, section 4.
    """
    op = "gae"
    check_mask(op, mask)
    check_same_shape(op, rewards=rewards, values=values, mask=mask)
    if rewards.dim() != 2:
        raise ValueError(f"{op}: rewards, values, mask are [B, T], got {describe(rewards=rewards)}")
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not (math.isfinite(number) and 0 <= number <= 1):
            raise ValueError(f"{op}: {name}={number!r} must lie in [0, 1]")
    dtype = compute_dtype(rewards, values)
    backend = resolve(
        backend, rewards.device, dtype, op=op,
        unsupported="torch.compile" if torch.compiler.is_compiling() else None,
    )  # fmt: skip
    if backend == "cpu":
        return _cpu_tokens.gae(rewards, values, mask, gamma, lam)
    with torch.no_grad():
        if backend == "triton":
            from . import _triton_advantages

            return _triton_advantages.gae(rewards, values, mask, gamma, lam)
        return reference.gae(rewards.to(dtype), values.to(dtype), mask, gamma, lam)


def whiten(x: Tensor, mask: Tensor, *, center: bool = True, backend: str = "auto") -> Tensor:
    """`(x - x[mask].mean()) * torch.rsqrt(x[mask].var() + 1e-8)`, 0 where mask is False.

    x, mask: any one shape, mask bool. `center=False` adds the mean back, which is what rewards
    want: unit deviation, their own mean. Unbiased variance (of a single entry: 0). float32, or
    float64 for float64 inputs. Masked entries are never read. Differentiable in x on the
    `reference` backend, which `auto` takes where x requires a gradient.

    Raises ValueError for shapes that differ. Source: docs/math.md, section 5, point 2.
    """
    op = "whiten"
    check_mask(op, mask)
    check_same_shape(op, x=x, mask=mask)
    dtype = compute_dtype(x)
    differentiated = x.requires_grad and torch.is_grad_enabled()
    compiled = torch.compiler.is_compiling()
    backend = resolve(
        backend, x.device, dtype, op=op,
        unsupported="torch.compile" if compiled else "a gradient" if differentiated else None,
    )  # fmt: skip
    if backend == "cpu":
        return _cpu_tokens.whiten(x, mask, center)
    if backend == "triton":
        from . import _triton_advantages

        return _triton_advantages.whiten(x, mask, center)
    return reference.whiten(x.to(dtype), mask, center)
