"""The head on a CPU, a chunk of rows at a time, in a fixed workspace.

The matrix products are torch's, the row work is csrc's. The number of rows in a chunk depends on
the workspace and the vocabulary only, never on whether there is a reference or a gradient: the same
rows then go through the same products in every op, and their log-probabilities agree to the last
bit. That is what makes PPO's first ratio exactly 1.

A chunk meets the weight tile by tile. Few rows times a whole vocabulary is bound by memory; a tile
stays in the cache between the packing of the product and its arithmetic (1.4 to 2 times the
rate), and a tile of a bf16 or fp16 weight is raised to float32 on its way, so that logits are never
rounded.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu
from ._backend import check_head, compute_dtype, row_temperature

WORKSPACE_MB = 48
TILE_SHARE = 12  # one part in twelve, 4 MB by default, is a tile of the weight in float32


class HeadOptions(NamedTuple):
    logit_scale: float
    softcap: float | None
    kl_direction: str
    valid_vocab: int
    workspace_bytes: int

    @property
    def tile_bytes(self) -> int:
        return self.workspace_bytes // TILE_SHARE

    @property
    def rows_per_chunk(self) -> int:
        logits_bytes = self.workspace_bytes - self.tile_bytes
        return max(1, logits_bytes // (2 * self.valid_vocab * 4))


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
    """Products with weight[:vocab], tile by tile."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> None:
        vocab, size = options.valid_vocab, weight.shape[1]
        self.weight = weight.detach()[:vocab]
        self.bias = None if bias is None else bias.detach()[:vocab].float().contiguous()
        self.tile_rows = min(vocab, max(1, options.tile_bytes // (4 * max(1, size))))
        direct = weight.dtype == torch.float32
        self.raised = None if direct else torch.empty(self.tile_rows, size)

    def _spans(self) -> Iterator[slice]:
        vocab = self.weight.shape[0]
        for start in range(0, vocab, self.tile_rows):
            yield slice(start, min(vocab, start + self.tile_rows))

    def _tile(self, span: slice) -> Tensor:
        tile = self.weight[span]
        return tile if self.raised is None else self.raised[: tile.shape[0]].copy_(tile)

    def logits_into(self, hidden: Tensor, logits: Tensor) -> None:
        for span in self._spans():
            torch.mm(hidden, self._tile(span).t(), out=logits[:, span])

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        total = torch.zeros(gradient.shape[0], self.weight.shape[1])
        for span in self._spans():
            total.addmm_(gradient[:, span], self._tile(span))
        return total

    def add_weight_gradient(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        for span in self._spans():
            total[span].addmm_(gradient[:, span].t(), hidden)


class Chunk(NamedTuple):
    span: slice  # of the rows that are worked on
    rows: Tensor  # [n] their places among the N rows
    hidden: Tensor  # [n, D] float32
    logits: Tensor  # [n, V] workspace
    ref_logits: Tensor | None  # [n, V] workspace
    targets: Tensor  # [n]
    temperature: Tensor  # [n]


class HeadGradients:
    """float32 accumulators of what the inputs need; None for what they do not."""

    def __init__(self, inputs: HeadInputs, needs: tuple[bool, bool, bool]) -> None:
        def zeros(x: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros(x.shape) if needed and x is not None else None

        self.hidden = zeros(inputs.hidden, needs[0])
        self.weight = zeros(inputs.weight, needs[1])
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
    """Runs `rows` of the inputs through the head, chunk by chunk, forward and backward."""

    def __init__(self, inputs: HeadInputs, rows: Tensor, options: HeadOptions) -> None:
        self.inputs, self.rows, self.options = inputs, rows, options
        self.policy = _Weight(inputs.weight, inputs.bias, options)
        self.reference: _Weight | None = None
        if inputs.ref_weight is not None:
            self.reference = _Weight(inputs.ref_weight, inputs.ref_bias, options)
        elif inputs.ref_hidden is not None:
            self.reference = self.policy
        shape = (min(options.rows_per_chunk, rows.numel()), options.valid_vocab)
        self._logits = torch.empty(shape)
        self._ref_logits = None if self.reference is None else torch.empty(shape)

    def chunks(self) -> Iterator[Chunk]:
        count, step = self.rows.numel(), self.options.rows_per_chunk
        for start in range(0, count, step):
            span = slice(start, min(count, start + step))
            rows = self.rows[span]
            yield Chunk(
                span,
                rows,
                self.inputs.hidden.index_select(0, rows).float(),
                self._logits[: rows.numel()],
                None if self._ref_logits is None else self._ref_logits[: rows.numel()],
                self.inputs.targets[rows],
                self.inputs.temperature[rows],
            )

    def statistics(self, chunk: Chunk, table: Tensor) -> None:
        """Fill table [n, TABLE_COLUMNS]; the tempered logits stay in the workspace."""
        self.policy.logits_into(chunk.hidden, chunk.logits)
        ref_bias = None
        if self.reference is not None:
            assert self.inputs.ref_hidden is not None and chunk.ref_logits is not None
            ref_hidden = self.inputs.ref_hidden.index_select(0, chunk.rows).float()
            self.reference.logits_into(ref_hidden, chunk.ref_logits)
            ref_bias = self.reference.bias
        _cpu.row_statistics(
            chunk.logits, chunk.ref_logits, chunk.targets, self.policy.bias, ref_bias,
            chunk.temperature, table, logit_scale=self.options.logit_scale,
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
        _cpu.row_gradient(
            chunk.logits, chunk.ref_logits, chunk.targets, chunk.temperature, table, coefficients,
            logit_scale=self.options.logit_scale, softcap=self.options.softcap,
            reverse=self.options.kl_direction == "reverse",
        )  # fmt: skip
        rows, hidden = chunk.rows, chunk.hidden
        if active.numel() < rows.numel():
            _cpu.compact_rows(chunk.logits, active)
            rows, hidden = rows[active], hidden[active]
        gradient = chunk.logits[: active.numel()]
        vocab = self.options.valid_vocab
        if gradients.hidden is not None:
            gradients.hidden.index_copy_(0, rows, self.policy.hidden_gradient(gradient))
        if gradients.weight is not None:
            self.policy.add_weight_gradient(gradient, hidden, gradients.weight)
        if gradients.bias is not None:
            gradients.bias[:vocab].add_(gradient.sum(0))
