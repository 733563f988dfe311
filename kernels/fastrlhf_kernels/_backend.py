"""Which backend runs an op, and the checks at its border.

`auto` resolves by device, once: `triton` on GPUs from sm_80 on (CUDA, ROCm, XPU), `cpu` for
float32, bfloat16 and float16 tensors on a CPU where the compiled module is there, `reference` for
everything else. A backend that is asked for by name runs or raises; it never falls back.

Checks of values (targets, temperatures) are made on the CPU only, where they cost no
synchronisation, and not under torch.compile, which cannot trace them.
"""

import os
from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from . import _cpu

BACKENDS = ("auto", "triton", "cpu", "reference")
KL_DIRECTIONS = ("forward", "reverse")
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_DEVICES = ("cuda", "xpu")  # ROCm's devices are called cuda
# Of operators that wait for the device: torch.compile leaves them out of its CUDA graphs.
WAITS = (torch.Tag.cudagraph_unsafe,)


def _device_backend(device_type: str, device_index: int | None) -> str:
    if device_type == "cpu":
        return "cpu" if _cpu.available() else "reference"
    if device_type not in TRITON_DEVICES or not TRITON_INSTALLED:
        return "reference"
    if device_type == "cuda" and not torch.version.hip:
        major, _ = torch.cuda.get_device_capability(device_index)
        return "triton" if major >= 8 else "reference"
    return "triton"


def _check_current(op: str, device: torch.device) -> None:
    """Triton launches on the current device, wherever the tensors are."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        current = torch.cuda.current_device()
        if device.index is not None and device.index != current:
            raise ValueError(
                f"{op}: tensors on {device} while cuda:{current} is current; call it under "
                f"torch.cuda.device({device.index})"
            )


def _require_triton(op: str, device: torch.device, dtype: torch.dtype) -> None:
    if not TRITON_INSTALLED:
        raise RuntimeError(f"{op}: backend='triton' needs Triton: pip install 'triton>=3.6'")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in TRITON_DEVICES and not (device.type == "cpu" and interpreted):
        raise RuntimeError(
            f"{op}: backend='triton' takes tensors on a GPU, got {device}; on a CPU its kernels "
            "run under TRITON_INTERPRET=1, set before Python starts"
        )
    if dtype == torch.float64:
        raise ValueError(f"{op}: backend='triton' computes in float32; float64 has 'reference'")


def resolve(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    op: str,
    available: Collection[str] = ("reference", "cpu", "triton"),
    unsupported: str | None = None,
) -> str:
    """The name of the backend to run.

    available: what `op` is written for. unsupported: what this call asks of the op that only the
    reference has, in words; then `auto` takes it and "cpu" or "triton" by name raises.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(BACKENDS)}")
    if backend == "auto":
        best = "reference"
        if dtype != torch.float64 and unsupported is None:
            best = _device_backend(device.type, device.index)
        chosen = best if best in available else "reference"
        if chosen == "triton":
            _check_current(op, device)
        return chosen
    if backend not in available:
        raise RuntimeError(f"{op} has no {backend!r} backend; it has {', '.join(available)}")
    if unsupported is not None and backend != "reference":
        raise ValueError(f"{op}: backend={backend!r} does not support {unsupported}")
    if backend == "triton":
        _require_triton(op, device, dtype)
        _check_current(op, device)
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"{op}: backend='cpu' takes tensors on a CPU, got {device}")
        if dtype == torch.float64:
            raise ValueError(f"{op}: backend='cpu' computes in float32; float64 has 'reference'")
        _cpu.require()
    return backend


def _values_visible(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def describe(**tensors: Tensor | None) -> str:
    return ", ".join(
        f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
        for name, x in tensors.items()
        if x is not None
    )


def check_device(op: str, **tensors: Tensor | None) -> None:
    if len({x.device for x in tensors.values() if x is not None}) > 1:
        raise ValueError(f"{op}: all tensors belong on one device, got {describe(**tensors)}")


def check_same_shape(op: str, **tensors: Tensor | None) -> None:
    if len({x.shape for x in tensors.values() if x is not None}) > 1:
        raise ValueError(f"{op}: shapes must agree, got {describe(**tensors)}")
    check_device(op, **tensors)


def check_mask(op: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool (True = trains), got {describe(mask=mask)}")


def check_choice(op: str, name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name}={value!r}: allowed are {', '.join(allowed)}")


def row_temperature(
    op: str, temperature: float | Tensor, targets: Tensor, dtype: torch.dtype
) -> Tensor:
    """[N] temperatures of the flattened rows."""
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"{op}: temperature={temperature!r} must be finite and > 0")
        return torch.full((targets.numel(),), temperature, dtype=dtype, device=targets.device)
    if temperature.dim() == 0:
        temperature = temperature.expand(targets.shape)
    if temperature.shape != targets.shape:
        raise ValueError(
            f"{op}: temperature must be a number or have one entry a row, got "
            f"{describe(temperature=temperature, targets=targets)}"
        )
    check_device(op, temperature=temperature, targets=targets)
    if _values_visible(temperature) and not bool((temperature > 0).all()):
        raise ValueError(
            f"{op}: temperature must be > 0 in every row, got {describe(temperature=temperature)}"
        )
    return temperature.detach().to(dtype).reshape(-1).contiguous()


def check_targets(op: str, targets: Tensor, used: Tensor, vocab: int) -> None:
    """Targets of used rows lie in [0, vocab)."""
    if not _values_visible(targets):
        return
    bad = used & ((targets < 0) | (targets >= vocab))
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"{op}: target {int(targets.flatten()[row])} of row {row} is outside [0, {vocab}), "
            f"got {describe(targets=targets)}"
        )


def _valid_columns(op: str, valid_vocab: int | None, vocab: int, shapes: Callable[[], str]) -> int:
    if valid_vocab is not None and not 0 < valid_vocab <= vocab:
        raise ValueError(
            f"{op}: valid_vocab={valid_vocab} must lie in [1, {vocab}], got {shapes()}"
        )
    return vocab if valid_vocab is None else valid_vocab


def check_logits(
    op: str,
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    *,
    valid_vocab: int | None,
    kl_direction: str,
) -> int:
    """Ranks, sizes and options of rows of logits; returns the number of valid columns."""
    shapes = partial(describe, logits=logits, targets=targets, ref_logits=ref_logits)
    if logits.dim() < 1 or not logits.shape[-1] or logits.shape[:-1] != targets.shape:
        raise ValueError(f"{op}: logits is [..., V] and targets [...], got {shapes()}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets must be int64, got {shapes()}")
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(f"{op}: ref_logits has the shape of logits, got {shapes()}")
    given = [logits] if ref_logits is None else [logits, ref_logits]
    if not all(x.dtype == torch.float64 or x.dtype in _cpu.TYPES for x in given):
        raise ValueError(f"{op}: logits are float32, bfloat16, float16 or float64, got {shapes()}")
    check_device(op, logits=logits, targets=targets, ref_logits=ref_logits)
    check_choice(op, "kl_direction", kl_direction, KL_DIRECTIONS)
    return _valid_columns(op, valid_vocab, logits.shape[-1], shapes)


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    *,
    valid_vocab: int | None,
    softcap: float | None,
    kl_direction: str,
) -> int:
    """Ranks, sizes and options of a head; returns the number of valid columns."""
    shapes = partial(
        describe, hidden=hidden, weight=weight, targets=targets, bias=bias,
        ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
    )  # fmt: skip
    if hidden.dim() < 2 or weight.dim() != 2:
        raise ValueError(f"{op}: hidden is [..., N, D] and weight [V, D], got {shapes()}")
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: hidden is [..., D], targets [...], weight [V, D], got {shapes()}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets must be int64, got {shapes()}")
    given = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    if not all(x is None or x.dtype == torch.float64 or x.dtype in _cpu.TYPES for x in given):
        raise ValueError(
            f"{op}: hidden, weight and bias are float32, bfloat16, float16 or float64, those of "
            f"the reference too, got {shapes()}"
        )
    vocab = weight.shape[0]
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"{op}: bias is [V], got {shapes()}")
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError(f"{op}: ref_weight and ref_bias need a ref_hidden, got {shapes()}")
    if ref_hidden is not None:
        if ref_hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"{op}: ref_hidden is [..., D'] with the rows of hidden, got {shapes()}"
            )
        head = weight if ref_weight is None else ref_weight
        if head.dim() != 2 or head.shape[0] != vocab or head.shape[1] != ref_hidden.shape[-1]:
            raise ValueError(
                f"{op}: ref_weight is [V, D'] for ref_hidden [..., D'], got {shapes()}"
            )
        if ref_bias is not None and (ref_weight is None or ref_bias.shape != (vocab,)):
            raise ValueError(f"{op}: ref_bias is [V] and needs a ref_weight, got {shapes()}")
        moving = weight.requires_grad or (bias is not None and bias.requires_grad)
        if ref_weight is None and moving:
            raise ValueError(
                f"{op}: weight requires a gradient, so KL would be taken against the moving head; "
                f"pass the frozen head as ref_weight, got {shapes()}"
            )
    check_device(
        op, hidden=hidden, weight=weight, targets=targets, bias=bias,
        ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
    )  # fmt: skip
    check_choice(op, "kl_direction", kl_direction, KL_DIRECTIONS)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap={softcap!r} must be > 0 or None")
    return _valid_columns(op, valid_vocab, vocab, shapes)
