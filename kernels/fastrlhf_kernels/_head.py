"""The head on a CPU, a chunk of rows at a time, in a fixed workspace.

The matrix products are torch's, but for one, and the row work is csrc's. How rows are cut into
chunks and columns into tiles depends on the workspace and the sizes of the problem only, never on
whether there is a reference or a gradient: the same rows then go through the same products in every
op, and their log-probabilities agree to the last bit. That is what makes PPO's first ratio exactly
1.

A chunk meets the weight tile by tile: a tile stays in the cache from the packing of its product to
the row work on its logits. Those are never rounded: a tile of a bf16 or fp16 weight is raised to
float32 on its way, or, where hidden states and weight are bf16 and the CPU multiplies such pairs,
goes through csrc's own product with float32 sums. Statistics alone keep the logits of one tile;
where a gradient follows, the tiles of a whole chunk lie one after another in the workspace.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu
from ._backend import check_head, compute_dtype, row_temperature

WORKSPACE_MB = 320  # without a reference half of it is used
TILE_SHARE = 12  # a tile of the weight in float32 is one part in twelve,
TILE_MB = 16  # and at most this,
TILE_COLUMNS = 2048  # and has no more columns: beyond, the products become slower again
TILE_STEP = 1024  # columns; csrc's blocks then lie alike in a tile and in a whole row
MAX_CHUNK_ROWS = 512  # more rows do not make the products faster


class HeadOptions(NamedTuple):
    logit_scale: float
    softcap: float | None
    kl_direction: str
    valid_vocab: int
    workspace_bytes: int

    @property
    def tile_bytes(self) -> int:
        return min(self.workspace_bytes // TILE_SHARE, TILE_MB * 2**20)

    @property
    def max_chunk_rows(self) -> int:
        logits_bytes = self.workspace_bytes - self.tile_bytes
        return min(MAX_CHUNK_ROWS, max(1, logits_bytes // (2 * self.valid_vocab * 4)))

    def chunk_rows(self, count: int) -> int:
        """Rows in a chunk of `count` rows: as even as they come, so that none is a small rest."""
        chunks = -(-count // self.max_chunk_rows)
        return max(1, -(-count // max(1, chunks)))

    def spans(self, size: int) -> list[slice]:
        """The tiles' columns, for a weight [V, size]."""
        columns = min(TILE_COLUMNS, max(1, self.tile_bytes // (4 * max(1, size))))
        if columns > TILE_STEP:
            columns -= columns % TILE_STEP
        vocab = self.valid_vocab
        return [slice(x, min(vocab, x + columns)) for x in range(0, vocab, columns)]


def workspace_bytes(op: str, workspace_mb: float | None) -> int:
    megabytes = WORKSPACE_MB if workspace_mb is None else workspace_mb
    if not megabytes > 0:
        raise ValueError(f"{op}: workspace_mb={workspace_mb!r} must be > 0 or None")
    return int(megabytes * 2**20)


class HeadInputs(NamedTuple):
    """What makes the logits: hidden [N, D], weight [V, D], bias [V], targets, temperature [N]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None


def head_inputs(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    kl_direction: str,
    valid_vocab: int | None,
    workspace_mb: float | None,
) -> tuple[HeadInputs, HeadOptions]:
    """Check a head at the border of `op`, and flatten its leading dimensions.

    The temperature is in the dtype to compute in.
    """
    columns = check_head(
        op, hidden, weight, targets, bias, ref_hidden, ref_weight, ref_bias,
        valid_vocab=valid_vocab, softcap=softcap, kl_direction=kl_direction,
    )  # fmt: skip
    dtype = compute_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    inputs = HeadInputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        row_temperature(op, temperature, targets, dtype),
        None if ref_hidden is None else ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        ref_weight,
        ref_bias,
    )
    size = workspace_bytes(op, workspace_mb)
    return inputs, HeadOptions(logit_scale, softcap, kl_direction, columns, size)


class _Weight:
    """Products with weight[:vocab], tile by tile, for hidden states of one dtype."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, hidden: Tensor, vocab: int, tile_columns: int
    ) -> None:
        self.weight = weight.detach()[:vocab]
        self.bias = None if bias is None else bias.detach()[:vocab].float().contiguous()
        self.tile_columns, depth = tile_columns, weight.shape[1]
        low = _cpu.multiplies_bfloat16(hidden, self.weight)
        self.packed = _cpu.packed_columns(tile_columns, depth) if low else None
        self._raised: Tensor | None = None

    def tile(self, span: slice) -> Tensor:
        """A tile in float32."""
        tile = self.weight[span]
        if tile.dtype == torch.float32:
            return tile
        if self._raised is None:
            size = (self.tile_columns, tile.shape[1])
            self._raised = torch.empty(size, dtype=torch.float32, device=tile.device)
        return self._raised[: tile.shape[0]].copy_(tile)

    def operand(self, hidden: Tensor) -> Tensor:
        """Rows of hidden, in float32, as `logits_into` takes them; no number is changed."""
        return hidden if self.packed is None else hidden.bfloat16()

    def logits_into(self, operand: Tensor, span: slice, logits: Tensor) -> None:
        if self.packed is None:
            torch.mm(operand, self.tile(span).t(), out=logits)
        else:
            _cpu.bfloat16_product(operand, self.weight[span], logits, self.packed)


class Chunk(NamedTuple):
    span: slice  # of the rows that are worked on
    rows: Tensor  # [n] their places among the N rows
    hidden: Tensor  # [n, D] float32
    targets: Tensor  # [n]
    temperature: Tensor  # [n]


class HeadGradients:
    """float32 accumulators of what the inputs need; None for what they do not.

    weight: one that is there already, and is added to.
    """

    def __init__(
        self, inputs: HeadInputs, needs: Sequence[bool], weight: Tensor | None = None
    ) -> None:
        def zeros(x: Tensor | None, needed: bool) -> Tensor | None:
            if not needed or x is None:
                return None
            return torch.zeros(x.shape, dtype=torch.float32, device=x.device)

        self.hidden = zeros(inputs.hidden, needs[0])
        self.weight = weight if weight is not None else zeros(inputs.weight, needs[1])
        self.bias = zeros(inputs.bias, needs[2])
        self.dtypes = [None if x is None else x.dtype for x in inputs[:3]]

    def needed(self) -> bool:
        return any(x is not None for x in (self.hidden, self.weight, self.bias))

    def scaled(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients times `factor`, in the dtypes of the inputs. Consumes the accumulators."""
        gradients = (self.hidden, self.weight, self.bias)
        if factor is not None:
            for x in gradients:
                if x is not None:
                    x.mul_(factor)
        return tuple(
            None if x is None else x.to(dtype)
            for x, dtype in zip(gradients, self.dtypes, strict=True)
        )


class ChunkedHead:
    """Runs `rows` of the inputs through the head, chunk by chunk, forward and backward.

    keep_logits: a chunk's logits stay until its `backward`; without, there is no backward.
    """

    def __init__(
        self, inputs: HeadInputs, rows: Tensor, options: HeadOptions, *, keep_logits: bool
    ) -> None:
        self.inputs, self.rows, self.options, self.keep_logits = inputs, rows, options, keep_logits
        vocab = options.valid_vocab
        self.spans = options.spans(inputs.weight.shape[1])
        columns = self.spans[0].stop
        self.policy = _Weight(inputs.weight, inputs.bias, inputs.hidden, vocab, columns)
        self.reference: _Weight | None = None
        if inputs.ref_hidden is not None:
            own = (inputs.ref_weight, inputs.ref_bias)
            shared = (inputs.weight, inputs.bias)
            weight, bias = shared if inputs.ref_weight is None else own
            assert weight is not None
            self.reference = _Weight(weight, bias, inputs.ref_hidden, vocab, columns)
        self.chunk_rows = count = options.chunk_rows(rows.numel())
        size = count * (vocab if keep_logits else columns)
        # Torch's default type and device may be anything.
        self._logits = torch.empty(size, dtype=torch.float32, device=rows.device)
        self._ref_logits = None if self.reference is None else torch.empty_like(self._logits)
        self._states = _cpu.row_states(count)

    def chunks(self) -> Iterator[Chunk]:
        count, step = self.rows.numel(), self.chunk_rows
        for start in range(0, count, step):
            span = slice(start, min(count, start + step))
            rows = self.rows[span]
            yield Chunk(
                span,
                rows,
                self.inputs.hidden.index_select(0, rows).float(),
                self.inputs.targets[rows],
                self.inputs.temperature[rows],
            )

    def _tile(self, count: int, span: slice) -> _cpu.Tile:
        """The place of a tile's logits: [count, t], contiguous."""
        start = span.start if self.keep_logits else 0
        place = slice(count * start, count * (start + span.stop - span.start))
        logits = self._logits[place].view(count, -1)
        ref = None if self._ref_logits is None else self._ref_logits[place].view(count, -1)
        return _cpu.Tile(logits, ref, span.start, self.options.valid_vocab)

    def statistics(self, chunk: Chunk, table: Tensor, extras: Tensor | None = None) -> None:
        """Fill table [n, TABLE_COLUMNS], and extras [n, 3] where wanted."""
        count, ref_operand, ref_bias = chunk.rows.numel(), None, None
        operand = self.policy.operand(chunk.hidden)
        if self.reference is not None:
            assert self.inputs.ref_hidden is not None
            ref_hidden = self.inputs.ref_hidden.index_select(0, chunk.rows).float()
            ref_operand, ref_bias = self.reference.operand(ref_hidden), self.reference.bias
        for span in self.spans:
            tile = self._tile(count, span)
            self.policy.logits_into(operand, span, tile.logits)
            if self.reference is not None:
                assert ref_operand is not None and tile.ref_logits is not None
                self.reference.logits_into(ref_operand, span, tile.ref_logits)
            _cpu.row_statistics(
                tile, chunk.targets, self.policy.bias, ref_bias, chunk.temperature,
                self._states[:count], table, extras, logit_scale=self.options.logit_scale,
                softcap=self.options.softcap, reverse=self.options.kl_direction == "reverse",
            )  # fmt: skip

    def backward(
        self, chunk: Chunk, table: Tensor, coefficients: Tensor, gradients: HeadGradients
    ) -> None:
        """Add the chunk's share to `gradients`; consumes what `statistics` left in the workspace.

        coefficients [n, 3]: ∂L/∂logprob, ∂L/∂entropy, ∂L/∂kl. Rows where all three are 0 take part
        in no product.
        """
        active = (coefficients != 0).any(-1).nonzero().squeeze(-1)
        if active.numel() == 0:
            return
        rows, hidden = chunk.rows[active], chunk.hidden[active]
        hidden_gradient = None if gradients.hidden is None else torch.zeros_like(hidden)
        for span in self.spans:
            tile = self._tile(chunk.rows.numel(), span)
            _cpu.row_gradient(
                tile, chunk.targets, chunk.temperature, table, coefficients,
                logit_scale=self.options.logit_scale, softcap=self.options.softcap,
                reverse=self.options.kl_direction == "reverse",
            )  # fmt: skip
            if active.numel() < chunk.rows.numel():
                _cpu.compact_rows(tile.logits, active)
            gradient = tile.logits[: active.numel()]
            if hidden_gradient is not None:
                hidden_gradient.addmm_(gradient, self.policy.tile(span))
            if gradients.weight is not None:
                gradients.weight[span].addmm_(gradient.t(), hidden)
            if gradients.bias is not None:
                gradients.bias[span].add_(gradient.sum(0))
        if gradients.hidden is not None and hidden_gradient is not None:
            gradients.hidden.index_copy_(0, rows, hidden_gradient)
