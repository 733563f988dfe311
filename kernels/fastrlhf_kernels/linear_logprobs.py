"""Log-probability, entropy and exact KL of a linear head, without its [N, V] logits.

Composable: any loss may be made of the outputs; the backward recomputes the logits (4 products with
the head in all, 3 when the head is frozen). Formulas: docs/math.md, sections 1 and 2.

Two custom operators, forward and backward, so that torch.compile takes the whole as one node; the
backends differ inside of them. The reference is plain torch and differentiable twice.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from . import reference
from ._backend import WAITS, check_choice, check_targets, resolve
from ._head import ChunkedHead, HeadGradients, HeadInputs, HeadOptions, head_inputs
from ._records import ENTROPY, EXTRA_STATS, KL, LOGPROB, TABLE_COLUMNS, TokenLogprobs
from .audit import visible_to_audit

COLUMNS = (LOGPROB, ENTROPY, KL)


@visible_to_audit
@torch.library.custom_op("fastrlhf::linear_logprobs", mutates_args=(), tags=WAITS)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    kl_direction: str,
    valid_vocab: int,
    workspace_bytes: int,
    ignore_index: int,
    extra: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """[3, N] log-probability, entropy, KL; the [N, TABLE_COLUMNS] table; [3 or 0, N] statistics."""
    inputs = HeadInputs(
        hidden, weight, bias, targets, temperature, ref_hidden, ref_weight, ref_bias
    )
    options = HeadOptions(logit_scale, softcap, kl_direction, valid_vocab, workspace_bytes)
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    found, found_extra = statistics_table(inputs, rows, options, extra, backend)
    table = found.new_zeros(targets.numel(), TABLE_COLUMNS).index_copy_(0, rows, found)
    statistics = found.new_zeros(len(EXTRA_STATS) if extra else 0, targets.numel())
    if found_extra is not None:
        statistics.index_copy_(1, rows, found_extra.t())
    return table[:, COLUMNS].t().contiguous(), table, statistics


def statistics_table(
    inputs: HeadInputs, rows: Tensor, options: HeadOptions, extra: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """The table [n, TABLE_COLUMNS] of `rows`, and their extra statistics [n, 3]."""
    if backend == "triton":
        from ._triton_head import head_statistics

        return head_statistics(inputs, rows, options, extra=extra)
    head = ChunkedHead(inputs, rows, options, keep_logits=False)
    table = torch.empty(rows.numel(), TABLE_COLUMNS, dtype=torch.float32, device=rows.device)
    extras = table.new_empty(rows.numel(), len(EXTRA_STATS)) if extra else None
    for chunk in head.chunks():
        head.statistics(chunk, table[chunk.span], None if extras is None else extras[chunk.span])
    return table, extras


@_forward.register_fake
def _(hidden, weight, bias, targets, *options):
    count = targets.shape[0]
    extra = options[-2]
    return (
        hidden.new_empty((3, count), dtype=torch.float32),
        hidden.new_empty((count, TABLE_COLUMNS), dtype=torch.float32),
        hidden.new_empty((len(EXTRA_STATS) if extra else 0, count), dtype=torch.float32),
    )


@visible_to_audit
@torch.library.custom_op("fastrlhf::linear_logprobs_backward", mutates_args=(), tags=WAITS)
def _backward(
    gradient: Tensor,
    table: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    kl_direction: str,
    valid_vocab: int,
    workspace_bytes: int,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed."""
    inputs = HeadInputs(
        hidden, weight, bias, targets, temperature, ref_hidden, ref_weight, ref_bias
    )
    options = HeadOptions(logit_scale, softcap, kl_direction, valid_vocab, workspace_bytes)
    needs = (needs_hidden, needs_weight, needs_bias)
    # Rows that the loss does not use need no logits either.
    active = ((gradient != 0).any(0) & (targets != ignore_index)).nonzero().squeeze(-1)
    coefficients = gradient.t()[active].contiguous()
    if ref_hidden is not None and not bool(coefficients[:, 2].any()):
        # Without a KL in the loss there is nothing to make of the reference's logits.
        inputs = inputs._replace(ref_hidden=None, ref_weight=None, ref_bias=None)
    found: tuple[Tensor | None, ...]
    if backend == "triton":
        from ._triton_head_gradient import head_gradients

        found = head_gradients(inputs, active, options, table[active], coefficients, needs)
    else:
        gradients = HeadGradients(inputs, needs)
        head = ChunkedHead(inputs, active, options, keep_logits=True)
        again = table.new_empty(active.numel(), TABLE_COLUMNS)
        for chunk in head.chunks():
            head.statistics(chunk, again[chunk.span])
            head.backward(chunk, again[chunk.span], coefficients[chunk.span], gradients)
        found = gradients.scaled()
    return tuple(hidden.new_empty(0) if x is None else x for x in found)  # type: ignore[return-value]


@_backward.register_fake
def _(gradient, table, hidden, weight, bias, *options):
    needs = options[-4:-1]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if needed and x is not None
        else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias), needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(*output[1:])
    # The others would arrive as zeros of their own size.
    ctx.set_materialize_grads(False)


def _autograd(ctx, gradient, *_):
    *tensors, table = ctx.saved_tensors
    needs = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    *options, _extra, backend = ctx.options
    found = _backward(gradient.contiguous(), table, *tensors, *options, *needs, backend)
    gradients = [x if needed else None for x, needed in zip(found, needs, strict=True)]
    return (*gradients, *[None] * (len(tensors) - 3 + len(ctx.options)))


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _reference(
    inputs: HeadInputs, rows: Tensor, options: HeadOptions, stats: Collection[str]
) -> TokenLogprobs:
    """Gather the valid rows, run the reference, put its results back among zeros."""
    if inputs.ref_hidden is not None:
        inputs = inputs._replace(ref_hidden=inputs.ref_hidden[rows])
    out, _ = reference.linear_statistics(
        inputs.hidden[rows], inputs.weight, inputs.bias, inputs.targets[rows],
        inputs.temperature[rows], inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias,
        logit_scale=options.logit_scale, softcap=options.softcap, valid_vocab=options.valid_vocab,
        kl_direction=options.kl_direction, stats=stats,
    )  # fmt: skip
    return reference.among_zeros(out, rows, inputs.targets.shape)


def _shaped(out: TokenLogprobs, shape: torch.Size) -> TokenLogprobs:
    return TokenLogprobs(
        out.logprobs.reshape(shape),
        out.entropy.reshape(shape),
        None if out.kl is None else out.kl.reshape(shape),
        {name: x.reshape(shape) for name, x in out.extra.items()},
    )


def _extra(statistics: Tensor, stats: Collection[str]) -> dict[str, Tensor]:
    named = dict(zip(EXTRA_STATS, statistics, strict=True))
    return {name: named[name].bool() if name == "is_top1" else named[name] for name in stats}


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_direction: str = "forward",
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    stats: Collection[str] = (),
    workspace_mb: float | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """`((hidden @ weight.T).float() / τ).log_softmax(-1).gather(-1, targets)`, entropy, KL(π‖ref).

    hidden: [N, D] or [..., D]; weight: [V, D]; targets: hidden's leading shape, int64; bias: [V];
    any mix of float32, bfloat16 and float16 (float64 runs the reference in float64). Logits are
    logit_scale·(W·h + b), soft-capped to softcap·tanh(z/softcap), divided by temperature, a number
    or one per row; columns from `valid_vocab` on do not exist. Outputs are float32 in nats, shaped
    like targets, differentiable in hidden, weight and bias.

    ref_hidden: [..., D'] gives KL(policy‖reference), or KL(reference‖policy) with
    kl_direction="reverse". Its head is ref_weight [V, D'] and ref_bias, or weight and bias where
    ref_weight is None. The reference gets no gradient. Rows whose target is `ignore_index` are
    never read and give 0. stats: any of "mean_logits", "is_top1", "log_sum_sq_probs" of the
    tempered logits, without gradient (of equal maxima `is_top1` means the first; with `triton`
    each). workspace_mb (by default 320) bounds what is held at a time: on `cpu` logits, where a
    call without a reference uses half of it and one without a gradient a single tile; on `triton`
    partial sums and slices of the gradient.

    The `cpu` backend gives the same bits as linear_policy_loss for the same valid rows, in the same
    order, with the same workspace. Raises ValueError, with the shapes, for what does not fit.
    Source: docs/math.md, sections 1 and 2.
    """
    op = "linear_logprobs"
    inputs, options = head_inputs(
        op, hidden, weight, targets, bias, temperature, ref_hidden, ref_weight, ref_bias,
        logit_scale=logit_scale, softcap=softcap, kl_direction=kl_direction,
        valid_vocab=valid_vocab, workspace_mb=workspace_mb,
    )  # fmt: skip
    for name in stats:
        check_choice(op, "stats", name, EXTRA_STATS)
    check_targets(op, targets, targets != ignore_index, options.valid_vocab)
    dtype = inputs.temperature.dtype
    backend = resolve(backend, hidden.device, dtype, op=op)
    if backend == "reference":
        rows = (inputs.targets != ignore_index).nonzero().squeeze(-1)
        out = _reference(inputs, rows, options, stats)
    else:
        tokens, _, statistics = _forward(*inputs, *options, ignore_index, bool(stats), backend)
        logprobs, entropy, kl = tokens.unbind()
        extra = _extra(statistics, stats) if stats else {}
        out = TokenLogprobs(logprobs, entropy, None if ref_hidden is None else kl, extra)
    return _shaped(out, targets.shape)
