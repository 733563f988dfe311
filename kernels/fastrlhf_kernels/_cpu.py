"""Bindings to the compiled CPU kernels (csrc): pointers and sizes only.

The compiled module does the row work; the matrix products are torch's. It knows nothing of torch:
every function here checks what its pointers promise (contiguous, the right type) and passes the
number of threads that torch uses.
"""

import warnings
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from ._records import EXTRA_STATS, TABLE_COLUMNS, row_offsets


class MissingKernelsWarning(UserWarning):
    """The compiled CPU kernels are not there, so `auto` takes the reference."""


# After torch, so that the kernels share the OpenMP library that it has loaded. A module that is
# there and does not load is an error; one that was never built is not.
try:
    _csrc = import_module(f"{__package__}._csrc")
except ModuleNotFoundError as missing:
    if missing.name != f"{__package__}._csrc":
        raise
    _csrc = None  # type: ignore[assignment]
    warnings.warn(
        "fastrlhf_kernels was installed without its compiled CPU kernels; backend='auto' uses the "
        "reference on CPUs. Install a C++17 compiler and reinstall the package to have them.",
        MissingKernelsWarning,
        stacklevel=3,  # whoever imports the package
    )

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""what logits that belong to the caller may be made of, as csrc numbers them"""


def available() -> bool:
    return _csrc is not None


def require() -> None:
    if _csrc is None:
        raise RuntimeError(
            "the compiled CPU kernels are not installed: install a C++17 compiler and reinstall "
            "the package (pip install --force-reinstall --no-deps fastrlhf), or use "
            "backend='reference'"
        )


def _pointer(x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    if x is None:
        return 0
    assert x.dtype == dtype and x.shape == shape and x.device.type == "cpu", (x.dtype, x.shape)
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    assert x.dim() == 2 or x.is_contiguous()
    return x.data_ptr()


def _threads(elements: int) -> int:
    """torch's number of threads, or fewer where waking them would cost more than they save."""
    return min(torch.get_num_threads(), 1 + elements // 65_536)


def multiplies_bfloat16(left: Tensor, right: Tensor) -> bool:
    """Whether `bfloat16_product` takes these operands on this machine."""
    low = left.dtype == right.dtype == torch.bfloat16
    fits = left.shape[1] % 2 == 0 and right.stride() == (right.shape[1], 1)
    return low and fits and bool(_csrc.has_bfloat16_products())


def packed_columns(columns: int, depth: int) -> Tensor:
    """Memory for `bfloat16_product` with that many columns."""
    rows = -(-columns // _csrc.PANEL) * _csrc.PANEL
    return torch.empty(rows, depth, dtype=torch.bfloat16, device="cpu")


def bfloat16_product(left: Tensor, right: Tensor, out: Tensor, packed: Tensor) -> None:
    """`torch.mm(left.float(), right.float().t(), out=out)`, summed in another order.

    left [n, d] and right [t, d] bfloat16, out [n, t] float32, packed: of `packed_columns`.
    """
    (rows, depth), columns = left.shape, right.shape[0]
    assert packed.shape[0] >= columns and left.is_contiguous() and right.is_contiguous()
    _csrc.bfloat16_product(
        _pointer(left, torch.bfloat16, (rows, depth)),
        _pointer(right, torch.bfloat16, (columns, depth)),
        _pointer(out, torch.float32, (rows, columns)), rows, columns, depth, out.stride(0),
        _pointer(packed, torch.bfloat16, (packed.shape[0], depth)), _threads(rows * columns * 8),
    )  # fmt: skip


def multiplies_few_rows(left: Tensor, right: Tensor) -> bool:
    """Whether `few_rows_product` takes these operands on this machine."""
    # A compiled module may be older than this file: what is only faster is not missed.
    if not hasattr(_csrc, "few_rows"):
        return False
    wide = left.dtype == torch.float32 and right.dtype in (torch.float32, torch.bfloat16)
    on_cpu = left.device.type == right.device.type == "cpu"
    fits = 0 < left.shape[0] <= _csrc.MOST_ROWS and right.is_contiguous() and left.shape[1] > 0
    return wide and on_cpu and fits and bool(_csrc.has_few_rows())


class LowRank(NamedTuple):
    """What an adapter adds to a linear map: scale · (x · downᵀ) · upᵀ."""

    down: Tensor  # [r, d]
    up: Tensor  # [t, r]
    scale: float


def few_rows_product(
    left: Tensor, right: Tensor, bias: Tensor | None, adapter: LowRank | None = None
) -> Tensor:
    """`F.linear(left, right.float(), bias)`, summed in another order, plus an adapter's share.

    left [n, d] float32 with n ≤ 64, right [t, d] float32 or bfloat16, bias [t] -> [n, t]; `right`
    is read where it lies.
    """
    (rows, depth), columns = left.shape, right.shape[0]
    left = left.contiguous()  # a copy that lives until the kernel has read it
    down, up, scale = adapter or (None, None, 0.0)
    rank = 0 if down is None else down.shape[0]
    out = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    lanes = -(-rows // _csrc.LANES) * _csrc.LANES
    # torch's memory starts at multiples of 64 bytes, which the kernel's loads need.
    packed = torch.empty(depth + rank, lanes, dtype=torch.float32, device="cpu")
    _csrc.few_rows(
        _pointer(left, torch.float32, (rows, depth)),
        _pointer(right, right.dtype, (columns, depth)), right.dtype == torch.bfloat16,
        _pointer(bias, torch.float32, (columns,)), out.data_ptr(), rows, columns, depth,
        _pointer(down, torch.float32, (rank, depth)), _pointer(up, torch.float32, (columns, rank)),
        rank, scale, packed.data_ptr(), packed[depth:].data_ptr(),
        _threads(rows * columns * depth // 16),
    )  # fmt: skip
    return out


def row_states(rows: int) -> Tensor:
    """Memory for what `row_statistics` knows of each row between two tiles."""
    return torch.empty(rows, _csrc.STATE_BYTES, dtype=torch.uint8, device="cpu")


class Tile(NamedTuple):
    """Columns `first` … of logits [n, vocab] that are worked on a tile at a time."""

    logits: Tensor  # [n, t] float32
    ref_logits: Tensor | None  # [n, t], strided alike
    first: int
    vocab: int

    def arguments(self) -> tuple[int, ...]:
        shape = rows, columns = self.logits.shape
        ref = self.ref_logits
        assert ref is None or ref.stride() == self.logits.stride()
        return (
            _pointer(self.logits, torch.float32, shape), _pointer(ref, torch.float32, shape),
            rows, columns, self.logits.stride(0), self.first, self.vocab,
        )  # fmt: skip


def row_statistics(
    tile: Tile,
    targets: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    states: Tensor,
    table: Tensor,
    extras: Tensor | None = None,
    *,
    logit_scale: float,
    softcap: float | None,
    reverse: bool,
) -> None:
    """Take a tile into the rows' states, and leave its tempered logits in it.

    The tile whose `first` is 0 starts the states [n, …] of `row_states`; the one that ends the
    vocabulary fills table [n, TABLE_COLUMNS], and extras [n, 3] with `EXTRA_STATS`. The biases
    are [vocab].
    """
    rows = tile.logits.shape[0]
    _csrc.row_statistics(
        *tile.arguments(), _pointer(targets, torch.int64, (rows,)),
        _pointer(temperature, torch.float32, (rows,)),
        _pointer(table, torch.float32, (rows, TABLE_COLUMNS)),
        _pointer(bias, torch.float32, (tile.vocab,)),
        _pointer(ref_bias, torch.float32, (tile.vocab,)),
        _pointer(states, torch.uint8, (rows, _csrc.STATE_BYTES)),
        _pointer(extras, torch.float32, (rows, len(EXTRA_STATS))),
        logit_scale, softcap or 0.0, reverse, _threads(tile.logits.numel()),
    )  # fmt: skip


def row_gradient(
    tile: Tile,
    targets: Tensor,
    temperature: Tensor,
    table: Tensor,
    coefficients: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    reverse: bool,
) -> None:
    """Turn what `row_statistics` left in a tile into the gradient of its raw logits.

    coefficients [n, 3]: ∂L/∂logprob, ∂L/∂entropy, ∂L/∂kl. A row whose three are 0 is left as it is.
    """
    rows = tile.logits.shape[0]
    _csrc.row_gradient(
        *tile.arguments(), _pointer(targets, torch.int64, (rows,)),
        _pointer(temperature, torch.float32, (rows,)),
        _pointer(table, torch.float32, (rows, TABLE_COLUMNS)),
        _pointer(coefficients, torch.float32, (rows, 3)),
        logit_scale, softcap or 0.0, reverse, _threads(tile.logits.numel()),
    )  # fmt: skip


def _place(x: Tensor | None, offsets: Tensor) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    assert x.device.type == "cpu" and (x.stride(-1) == 1 or x.shape[-1] == 1)
    return x.data_ptr(), TYPES[x.dtype], _pointer(offsets, torch.int64, (offsets.numel(),))


def logit_statistics(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    used: Tensor,
    temperature: Tensor,
    table: Tensor,
    *,
    columns: int,
    reverse: bool,
) -> None:
    """Fill table [N, TABLE_COLUMNS] where used [N], from the first `columns` of logits [..., V].

    The logits are read where they lie, whatever the strides of their leading dimensions, and not
    changed; rows that are not used are not read.
    """
    offsets = row_offsets(logits)
    ref_offsets = offsets if ref_logits is None else row_offsets(ref_logits)
    rows = offsets.numel()
    assert ref_logits is None or ref_logits.shape == logits.shape
    _csrc.logit_statistics(
        *_place(logits, offsets), *_place(ref_logits, ref_offsets), rows, columns,
        _pointer(targets, torch.int64, (rows,)), _pointer(used, torch.bool, (rows,)),
        _pointer(temperature, torch.float32, (rows,)),
        _pointer(table, torch.float32, (rows, TABLE_COLUMNS)),
        reverse, _threads(logits.numel()),
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
    offsets, gradient_offsets = row_offsets(logits), row_offsets(gradient)
    ref_offsets = offsets if ref_logits is None else row_offsets(ref_logits)
    rows = offsets.numel()
    assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
    gradient_pointer, _, gradient_offsets_pointer = _place(gradient, gradient_offsets)
    _csrc.logit_gradient(
        *_place(logits, offsets), *_place(ref_logits, ref_offsets), rows, columns,
        _pointer(targets, torch.int64, (rows,)), _pointer(temperature, torch.float32, (rows,)),
        _pointer(table, torch.float32, (rows, TABLE_COLUMNS)),
        _pointer(coefficients, torch.float32, (rows, 3)),
        gradient_pointer, gradient_offsets_pointer, logits.shape[-1],
        reverse, _threads(logits.numel()),
    )  # fmt: skip


def compact_rows(logits: Tensor, kept: Tensor) -> None:
    """logits[: len(kept)] = logits[kept], in place; `kept` ascends."""
    _csrc.compact_rows(
        _pointer(logits, torch.float32, (logits.shape[0], logits.shape[1])),
        _pointer(kept, torch.int64, (kept.numel(),)), kept.numel(),
        logits.shape[1], logits.stride(0), _threads(logits.numel()),
    )  # fmt: skip


def sample_rows(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Tokens [B] (−1 where a row has no finite sum) and their log-probabilities [B].

    logits [B, V] of any of `TYPES` are read where they lie.
    """
    rows, columns = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device="cpu")
    logprobs = torch.empty(rows, dtype=torch.float32, device="cpu")
    offsets = row_offsets(logits)
    _csrc.sample(
        *_place(logits, offsets), rows, columns, _pointer(temperature, torch.float32, (rows,)),
        _pointer(uniform, torch.float32, (rows,)), top_k, top_p,
        _pointer(tokens, torch.int64, (rows,)), _pointer(logprobs, torch.float32, (rows,)),
        _threads(logits.numel()),
    )  # fmt: skip
    return tokens, logprobs
