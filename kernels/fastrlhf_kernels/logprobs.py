"""Log-probability, entropy and exact KL of logits that are there already.

For loops in which the model hands out its logits (otherwise `linear_logprobs` does without them).
The `cpu` backend reads them where they lie, in their own type and layout, a block of columns at a
time: no float32 copy, no log-softmax, no probabilities. The one [N, V] tensor that it makes is the
gradient, and with inplace_backward not even that. Formulas: docs/math.md, sections 1 and 2.

In place. The backward writes the gradient over the logits' own storage and counts this as a change
of theirs, so that autograd raises where another backward would still read them. Nothing can see
that for readers outside of autograd: whoever passes inplace_backward=True gives the logits away.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import _cpu, reference
from ._backend import (
    check_logits,
    check_targets,
    compute_dtype,
    describe,
    resolve,
    row_temperature,
)
from ._records import ENTROPY, KL, LOGPROB, TABLE_COLUMNS, TokenLogprobs
from .audit import visible_to_audit


@visible_to_audit
@torch.library.custom_op("fastrlhf::logprobs", mutates_args=())
def _forward(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    used: Tensor,
    temperature: Tensor,
    columns: int,
    reverse: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """[3, N] log-probability, entropy, KL, and the [N, TABLE_COLUMNS] table."""
    table = temperature.new_zeros(targets.numel(), TABLE_COLUMNS)
    _statistics(backend)(
        logits, ref_logits, targets, used, temperature, table, columns=columns, reverse=reverse
    )
    return table[:, (LOGPROB, ENTROPY, KL)].t().contiguous(), table


def _statistics(backend: str) -> Callable[..., None]:
    if backend == "triton":
        from ._triton_rows import logit_statistics

        return logit_statistics
    return _cpu.logit_statistics


def _gradient(backend: str) -> Callable[..., None]:
    if backend == "triton":
        from ._triton_rows_gradient import logit_gradient

        return logit_gradient
    return _cpu.logit_gradient


@_forward.register_fake
def _(logits, ref_logits, targets, used, temperature, *options):
    count = targets.shape[0]
    return temperature.new_empty(3, count), temperature.new_empty(count, TABLE_COLUMNS)


@visible_to_audit
@torch.library.custom_op("fastrlhf::logprobs_backward", mutates_args=())
def _backward(
    coefficients: Tensor,
    table: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    columns: int,
    reverse: bool,
    backend: str,
) -> Tensor:
    gradient = torch.empty_like(logits)
    _gradient(backend)(
        logits, ref_logits, targets, temperature, table, coefficients, gradient,
        columns=columns, reverse=reverse,
    )  # fmt: skip
    return gradient


@_backward.register_fake
def _(coefficients, table, logits, *options):
    return torch.empty_like(logits)


@visible_to_audit
@torch.library.custom_op("fastrlhf::logprobs_backward_", mutates_args=("logits",))
def _backward_(
    coefficients: Tensor,
    table: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    columns: int,
    reverse: bool,
    backend: str,
) -> None:
    """`_backward` that leaves the gradient in the place of the logits."""
    _gradient(backend)(
        logits, ref_logits, targets, temperature, table, coefficients, logits,
        columns=columns, reverse=reverse,
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    *tensors, columns, reverse, ctx.inplace_backward, backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (columns, reverse, backend)
    ctx.overwritten = False
    ctx.mark_non_differentiable(output[1])
    # The others would arrive as zeros of their own size.
    ctx.set_materialize_grads(False)


def _autograd(ctx, gradient, _):
    if ctx.overwritten:
        raise RuntimeError(
            "logprobs: backward was already called, and with inplace_backward=True it has "
            "written the gradient over the logits; run it again from the logits"
        )
    logits, ref_logits, targets, used, temperature, table = ctx.saved_tensors
    coefficients = torch.where(used, gradient, 0).t().contiguous()
    given = (coefficients, table, logits, ref_logits, targets, temperature, *ctx.options)
    if ctx.inplace_backward:
        ctx.overwritten = True
        with torch.no_grad():
            _backward_(*given)
        result = logits.detach()
    else:
        result = _backward(*given)
    return (result, *[None] * 8)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _reference(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    used: Tensor,
    temperature: Tensor,
    columns: int,
    kl_direction: str,
) -> TokenLogprobs:
    rows = used.nonzero().squeeze(-1)

    def tempered(x: Tensor) -> Tensor:
        valid = x.reshape(-1, x.shape[-1])[rows, :columns]
        return valid.to(temperature.dtype) / temperature[rows, None]

    out, _ = reference.token_statistics(
        tempered(logits), targets[rows], None if ref_logits is None else tempered(ref_logits),
        kl_direction=kl_direction,
    )  # fmt: skip
    return reference.among_zeros(out, rows, logits.shape[:-1])


def _rows_overlap(x: Tensor) -> bool:
    """Whether two entries of x may lie in the same place, as in an expanded tensor."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _memory(x: Tensor) -> tuple[int, int]:
    """First and one past the last byte of a tensor that is not empty."""
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _check_given_away(op: str, logits: Tensor, ref_logits: Tensor | None) -> None:
    """Refuse to write over logits that are seen to be needed."""
    owner = logits if logits._base is None else logits._base
    shapes = describe(logits=logits, ref_logits=ref_logits)
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"{op}: inplace_backward would write the gradient over a leaf that requires a "
            f"gradient (the logits, or what they are a view of), got {shapes}"
        )
    if not logits.numel():
        return
    if _rows_overlap(logits):
        raise ValueError(f"{op}: inplace_backward needs rows with memory of their own: {shapes}")
    if ref_logits is not None and ref_logits.numel():
        (start, end), (ref_start, ref_end) = _memory(logits), _memory(ref_logits)
        if start < ref_end and ref_start < end:
            raise ValueError(
                f"{op}: inplace_backward would write over ref_logits, which share memory with "
                f"logits, got {shapes}"
            )


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ref_logits: Tensor | None = None,
    kl_direction: str = "forward",
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """`(logits.float() / τ).log_softmax(-1).gather(-1, targets)`, entropy, KL(π‖ref).

    logits: [..., V] float32, bfloat16 or float16 (float64 runs the reference in float64); targets:
    [...] int64; temperature: a number or [...]; columns from `valid_vocab` on do not exist and
    columns of −inf have probability 0. Outputs are float32 in nats, shaped like targets, and
    differentiable in logits, whose gradient has their dtype.

    ref_logits: like logits, in any of these dtypes, divided by the same temperature, gives
    KL(policy‖reference), or KL(reference‖policy) with kl_direction="reverse"; it gets no gradient.
    Rows whose target is `ignore_index` are never read and give 0 and no gradient. Any leading
    strides are read without a copy (`logits[:, :-1]`); V columns that are not adjacent cost one.

    inplace_backward: the caller gives the logits away, and the backward may write their gradient
    over them, so that no second [N, V] tensor is made; the `reference` backend makes no use of it.
    Refused for a leaf that requires a gradient or a view of one, for rows that overlap, and for
    logits that share memory with ref_logits. A second backward raises, and so does autograd where
    another operation has kept the logits for a backward that comes later.

    The `cpu` backend gives the statistics of linear_logprobs for the same logits to the last bit,
    where the tiles of its head have 1024 columns or more (by default, D up to 4096).
    Raises ValueError, with the shapes, for what does not fit. Source: docs/math.md, sections 1, 2.
    """
    op = "logprobs"
    columns = check_logits(
        op, logits, targets, ref_logits, valid_vocab=valid_vocab, kl_direction=kl_direction
    )
    if inplace_backward and not torch.compiler.is_compiling():
        _check_given_away(op, logits, ref_logits)
    used = targets != ignore_index
    check_targets(op, targets, used, columns)
    row_temperatures = row_temperature(op, temperature, targets, compute_dtype(logits, ref_logits))
    backend = resolve(backend, logits.device, row_temperatures.dtype, op=op)
    ref_logits = None if ref_logits is None else ref_logits.detach()
    targets, used = targets.reshape(-1).contiguous(), used.reshape(-1).contiguous()
    if backend == "reference":
        return _reference(
            logits, ref_logits, targets, used, row_temperatures, columns, kl_direction
        )
    readable_ref = None if ref_logits is None else _readable(ref_logits)
    tokens, _ = _forward(
        _readable(logits), readable_ref, targets, used, row_temperatures, columns,
        kl_direction == "reverse", inplace_backward, backend,
    )  # fmt: skip
    found, entropy, kl = (x.reshape(logits.shape[:-1]) for x in tokens.unbind())
    return TokenLogprobs(found, entropy, None if ref_logits is None else kl)
