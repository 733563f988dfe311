"""Sample tokens, and say with which log-probability.

One uniform number a row, drawn by torch's generator, goes through the inverse of the cumulative
distribution; every backend picks the same token up to rounding. The log-probability returned is
log-softmax(z/τ) over the whole vocabulary, also where top_k or top_p narrowed the choice: that is
what the update recomputes.
"""

import warnings

import torch
from torch import Tensor

from . import _cpu, reference
from ._backend import check_device, compute_dtype, describe, resolve, row_temperature


class TruncatedSamplingWarning(UserWarning):
    """top_k or top_p draws from another distribution than the one the update differentiates."""


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`torch.multinomial((logits / τ).softmax(-1), 1)`, and the tokens' `log_softmax(logits / τ)`.

    logits: [B, V], any float type, rows with −inf entries allowed. temperature: a number or [B].
    top_k: keep the k largest (0 keeps all). top_p: keep the smallest set of most likely tokens with
    at least this mass (1 keeps all). Either one warns, because the log-probabilities stay those of
    the whole distribution. uniform: [B] float32 in [0, 1), instead of numbers drawn with generator.
    Returns tokens [B] int64 and logprobs [B] float32, without gradient.

    Raises ValueError for another rank, temperature ≤ 0, top_k < 0, top_p outside (0, 1], and rows
    without a finite entry or with NaN; on a GPU: token −1 and log-probability 0 instead, without a
    synchronisation.
    """
    op = "sample"
    if logits.dim() != 2 or not logits.dtype.is_floating_point or not logits.shape[1]:
        raise ValueError(f"{op}: logits is [B, V] floating point, got {describe(logits=logits)}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_k={top_k!r} must be ≥ 0 and top_p={top_p!r} in (0, 1]")
    narrowed = bool(top_k) or top_p < 1
    dtype = compute_dtype(logits)
    backend = resolve(backend, logits.device, dtype, op=op)
    if narrowed:
        warnings.warn(
            f"sample: top_k={top_k} and top_p={top_p} draw from a narrower distribution than the "
            "log-probabilities returned, so the policy's ratio is not that of the sampler",
            TruncatedSamplingWarning,
            stacklevel=2,
        )
    with torch.no_grad():
        if uniform is None:
            uniform = torch.rand(
                logits.shape[0], generator=generator, dtype=torch.float32, device=logits.device
            )
        elif uniform.shape != logits.shape[:1] or uniform.dtype != torch.float32:
            raise ValueError(f"{op}: uniform is [B] float32, got {describe(uniform=uniform)}")
        check_device(op, logits=logits, uniform=uniform)
        uniform = uniform.contiguous()  # a column of a table of them is not
        row_temperatures = row_temperature(op, temperature, uniform, dtype)
        if backend == "cpu":
            readable = logits if logits.stride(-1) == 1 else logits.contiguous()
            tokens, logprobs = _cpu.sample_rows(readable, row_temperatures, uniform, top_k, top_p)
        elif backend == "triton":
            from . import _triton_sampling

            tokens, logprobs = _triton_sampling.sample(
                logits, row_temperatures, uniform, top_k, top_p
            )
        else:
            tokens, logprobs = reference.sample(logits, row_temperatures, uniform, top_k, top_p)
    if logits.device.type == "cpu" and bool((tokens.lt(0) | logprobs.isnan()).any()):
        raise ValueError(f"{op}: a row has NaN or no finite entry, got {describe(logits=logits)}")
    return tokens, logprobs
