"""The policy loss of a head on a GPU, its gradient formed while a chunk's logits are there.

A chunk of rows: the product with the head, by the library, into float32; its statistics; the loss
of its tokens and their three derivatives; the gradient of the logits, of the rows that have one,
side by side in the type of the hidden states; then the products with it. No tensor of the
vocabulary's width has more rows than a chunk. Formulas: docs/math.md, sections 1 to 3.

How many rows have a signal is known on the GPU first: one synchronisation a chunk, and with fp16
operands one more, for the largest derivative: the gradient of the logits is scaled by it, so that
it does not vanish in fp16, and the products are scaled back.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._head import HeadInputs, HeadOptions
from ._records import TABLE_COLUMNS
from ._triton_head_gradient import float32_product
from ._triton_rows import row_statistics
from ._triton_rows_gradient import row_gradient
from ._triton_tokens import policy_coefficients

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
        width = 8 if self.has_reference else 4
        bytes_per_row = options.valid_vocab * (width + self.dtype.itemsize * grad)
        step = max(1, options.workspace_bytes // bytes_per_row)
        self.step = step - step % ROWS if step > ROWS else step
        held = min(self.step, rows.numel())
        columns = options.valid_vocab

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, columns, dtype=dtype, device=rows.device)

        self.logits = empty(held * (1 + self.has_reference), torch.float32)
        self.gradient = empty(held * grad, self.dtype)

    def _head(self, weight: Tensor | None) -> Tensor | None:
        return (
            None if weight is None else weight.detach()[: self.options.valid_vocab].to(self.dtype)
        )

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
            float32_product(hidden, self.weight.t(), out=policy)
            return policy, None
        assert self.inputs.ref_hidden is not None and self.ref_weight is not None
        ref_hidden = self.inputs.ref_hidden.index_select(0, rows).to(self.dtype)
        if self.shared:
            both = torch.cat([hidden, ref_hidden])
            float32_product(both, self.weight.t(), out=self.logits[: 2 * n])
        else:
            float32_product(hidden, self.weight.t(), out=policy)
            float32_product(ref_hidden, self.ref_weight.t(), out=reference)
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


def _scale(coefficients: Tensor) -> float:
    """The power of two that brings the largest coefficient to between 2^7 and 2^8.

    fp16 ends at 2^16 and, with few bits left, at 2^−24: a gradient over the number of tokens times
    a probability is soon less. What multiplies a coefficient is rarely above 2^8.
    """
    exponent = math.frexp(float(coefficients.abs().amax()))[1]
    return 2.0 ** min(8 - exponent, 120)


def loss_in_forward(
    inputs: HeadInputs,
    rows: Tensor,
    options: HeadOptions,
    tokens: Any,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The table of `rows`, and float32 gradients of hidden, weight and bias where needed.

    tokens: the `_Tokens` of linear_policy_loss, which say what the loss of a row is.
    """
    chunks = _Chunks(inputs, rows, options, any(needs))
    table = torch.empty(rows.numel(), TABLE_COLUMNS, dtype=torch.float32, device=rows.device)
    gradients = [
        torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if needed and x is not None
        else None
        for x, needed in zip(inputs[:3], needs, strict=True)
    ]
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
        if not any(needs):
            continue
        coefficients = _coefficients(tokens, part, span)
        active = (coefficients != 0).any(-1).nonzero().squeeze(-1)
        slots = torch.full_like(chunk, -1)
        slots[active] = torch.arange(active.numel(), device=rows.device)
        gradient = chunks.gradient[: active.numel()]
        scale = _scale(coefficients) if chunks.dtype == torch.float16 else 1.0
        scaled = coefficients if scale == 1.0 else coefficients * scale
        row_gradient(*given, temperature, part, scaled, slots, gradient, **transform)
        _accumulate(gradients, gradient, chunks.weight, hidden[active], chunk[active], 1 / scale)
    return table, tuple(gradients)


def _accumulate(
    gradients: list[Tensor | None],
    gradient: Tensor,
    weight: Tensor | None,
    hidden: Tensor,
    rows: Tensor,
    alpha: float,
) -> None:
    """Add what alpha times the gradient of a chunk's logits [m, V] gives the three."""
    on_hidden, on_weight, on_bias = gradients
    assert weight is not None
    if on_hidden is not None:
        on_hidden.index_copy_(0, rows, float32_product(gradient, weight, alpha=alpha))
    if on_weight is not None:
        out = on_weight[: gradient.shape[1]]
        float32_product(gradient.t(), hidden, out=out, accumulate=True, alpha=alpha)
    if on_bias is not None:
        on_bias[: gradient.shape[1]].add_(gradient.sum(0, dtype=torch.float32), alpha=alpha)
