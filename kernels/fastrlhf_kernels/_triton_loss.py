"""The policy loss of a head on a GPU, its gradient formed while a chunk's logits are there.

A chunk of rows: the product with the head, by the library, into float32; its statistics; the loss
of its tokens and their three derivatives; the gradient of the logits, of the rows that have one,
side by side in the type of the hidden states; then the products with it. No tensor of the
vocabulary's width has more rows than a chunk. Where the dtypes differ all is done in float32, and a
head that is not is raised to it a slice at a time, anew in every chunk. Formulas: docs/math.md,
sections 1 to 3.

How many rows have a signal is known on the GPU first: one synchronisation a chunk, and with fp16
operands one more, for the largest derivative: the gradient of the logits is scaled by it, so that
it does not vanish in fp16, and the products are scaled back.

A known cost: each chunk adds to the whole gradient of a trained head, in float32, and with few rows
that is more traffic than the products. The default workspace gives a vocabulary of 151,936 no more
than 256 rows. With a trained head of 16 bits give a workspace_mb of about 6·V·1000 / 2^20.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._head import HeadGradients, HeadInputs, HeadOptions
from ._records import TABLE_COLUMNS
from ._triton_head_gradient import float32_product, fp16_scale
from ._triton_rows import row_statistics
from ._triton_rows_gradient import row_gradient
from ._triton_tokens import policy_coefficients

RAISED_SHARE = 8
"""a slice of a head that is raised to float32 takes at most one part in so many of the workspace"""
ROWS = 128
"""a chunk has a multiple of this many rows where the workspace allows: a tile of the products"""


class _Chunks:
    """The workspace: float32 logits of policy and reference, and the gradient to multiply with."""

    def __init__(self, inputs: HeadInputs, rows: Tensor, options: HeadOptions, grad: bool) -> None:
        self.inputs, self.rows, self.options = inputs, rows, options
        given = (inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight)
        types = {x.dtype for x in given if x is not None}
        self.dtype = types.pop() if len(types) == 1 else torch.float32
        self.has_reference = inputs.ref_hidden is not None
        self.shared = self.has_reference and inputs.ref_weight is None
        self.weight = self._head(inputs.weight)
        self.ref_weight = self.weight if self.shared else self._head(inputs.ref_weight)
        self.bias, self.ref_bias = self._bias(inputs.bias), self._bias(inputs.ref_bias)
        if self.shared:
            self.ref_bias = self.bias
        self.raised = self._room()
        width = 8 if self.has_reference else 4
        bytes_per_row = options.valid_vocab * (width + self.dtype.itemsize * grad)
        free = options.workspace_bytes - 4 * self.raised.numel()
        step = max(1, free // bytes_per_row)
        self.step = step - step % ROWS if step > ROWS else step
        held = min(self.step, rows.numel())
        columns = options.valid_vocab

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, columns, dtype=dtype, device=rows.device)

        self.logits = empty(held * (1 + self.has_reference), torch.float32)
        self.gradient = empty(held * grad, self.dtype)

    def _head(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.detach()[: self.options.valid_vocab]

    def _room(self) -> Tensor:
        """[columns, D] float32 for slices of heads that are not of the dtype to compute in."""
        heads = [x for x in (self.weight, self.ref_weight) if x is not None]
        size = max((x.shape[1] for x in heads if x.dtype != self.dtype), default=0)
        columns = self.options.workspace_bytes // (RAISED_SHARE * 4 * max(1, size))
        columns = min(self.options.valid_vocab, max(1, columns)) if size else 0
        return heads[0].new_empty(columns, size, dtype=torch.float32)

    def slices(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the vocabulary and their weights, in the dtype to compute in."""
        if weight.dtype == self.dtype:
            yield slice(0, weight.shape[0]), weight
            return
        step, room = self.raised.shape[0], self.raised[:, : weight.shape[1]]
        for start in range(0, weight.shape[0], step):
            part = weight[start : start + step]
            count = part.shape[0]
            yield slice(start, start + count), room[:count].copy_(part)

    def multiply(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        for columns, part in self.slices(weight):
            float32_product(hidden, part.t(), out=out[:, columns])

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        # The kernels read adjacent numbers.
        return bias.detach()[: self.options.valid_vocab].float().contiguous()

    def spans(self) -> Iterator[slice]:
        count = self.rows.numel()
        for start in range(0, count, self.step):
            yield slice(start, min(count, start + self.step))

    def hidden(self, rows: Tensor) -> Tensor:
        return self.inputs.hidden.detach().index_select(0, rows).to(self.dtype)

    def make_logits(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Policy and reference [n, V]; with one head, of one product, so that it is read once."""
        n = rows.numel()
        policy, reference = self.logits[:n], self.logits[n : 2 * n]
        assert self.weight is not None
        if not self.has_reference:
            self.multiply(hidden, self.weight, policy)
            return policy, None
        assert self.inputs.ref_hidden is not None and self.ref_weight is not None
        ref_hidden = self.inputs.ref_hidden.index_select(0, rows).to(self.dtype)
        if self.shared:
            both = torch.cat([hidden, ref_hidden])
            self.multiply(both, self.weight, self.logits[: 2 * n])
        else:
            self.multiply(hidden, self.weight, policy)
            self.multiply(ref_hidden, self.ref_weight, reference)
        return policy, reference


def _coefficients(tokens: Any, table: Tensor, span: slice) -> Tensor:
    """`tokens.coefficients`, in one launch."""

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[span]

    return policy_coefficients(
        tokens.spec, table, tokens.old_logprobs[span], tokens.advantages[span],
        part(tokens.ref_logprobs), part(tokens.log_ratios), tokens.mean.weights[span],
        tokens.mean.num_items, tokens.has_reference,
    )[0]  # fmt: skip


def loss_in_forward(
    inputs: HeadInputs,
    rows: Tensor,
    options: HeadOptions,
    tokens: Any,
    gradients: HeadGradients,
) -> Tensor:
    """The table of `rows`; adds to the gradients of hidden, weight and bias.

    tokens: the `Tokens` of _policy_loss_operator, which say what the loss of a row is.
    """
    chunks = _Chunks(inputs, rows, options, gradients.needed())
    table = torch.empty(rows.numel(), TABLE_COLUMNS, dtype=torch.float32, device=rows.device)
    transform: dict[str, Any] = {
        "logit_scale": options.logit_scale,
        "softcap": options.softcap,
        "reverse": options.kl_direction == "reverse",
    }
    for span in chunks.spans():
        chunk, part = rows[span], table[span]
        hidden = chunks.hidden(chunk)
        logits, ref_logits = chunks.make_logits(hidden, chunk)
        given = (logits, ref_logits, inputs.targets[chunk], chunks.bias, chunks.ref_bias)
        temperature = inputs.temperature[chunk]
        row_statistics(*given, temperature, part, **transform)
        if not gradients.needed():
            continue
        coefficients = _coefficients(tokens, part, span)
        active = (coefficients != 0).any(-1).nonzero().squeeze(-1)
        slots = torch.full_like(chunk, -1)
        slots[active] = torch.arange(active.numel(), device=rows.device)
        gradient = chunks.gradient[: active.numel()]
        scale = fp16_scale(coefficients) if chunks.dtype == torch.float16 else 1.0
        scaled = coefficients if scale == 1.0 else coefficients * scale
        row_gradient(*given, temperature, part, scaled, slots, gradient, **transform)
        _accumulate(gradients, gradient, chunks, hidden[active], chunk[active], 1 / scale)
    return table


def _accumulate(
    gradients: HeadGradients,
    gradient: Tensor,
    chunks: _Chunks,
    hidden: Tensor,
    rows: Tensor,
    alpha: float,
) -> None:
    """Add what alpha times the gradient of a chunk's logits [m, V] gives the three."""
    on_hidden, on_weight, on_bias = gradients.hidden, gradients.weight, gradients.bias
    assert chunks.weight is not None
    if on_hidden is not None:
        total: Tensor | None = None
        for columns, part in chunks.slices(chunks.weight):
            total = float32_product(
                gradient[:, columns], part, out=total, accumulate=total is not None, alpha=alpha
            )
        assert total is not None
        on_hidden.index_copy_(0, rows, total)
    if on_weight is not None:
        out = on_weight[: gradient.shape[1]]
        float32_product(gradient.t(), hidden, out=out, accumulate=True, alpha=alpha)
    if on_bias is not None:
        on_bias[: gradient.shape[1]].add_(gradient.sum(0, dtype=torch.float32), alpha=alpha)
