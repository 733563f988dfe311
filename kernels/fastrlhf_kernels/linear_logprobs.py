"""Log-probability, entropy and exact KL of a linear head, without its [N, V] logits.

Composable: any loss may be made of the outputs; the backward recomputes the logits chunk by chunk
(4 products with the head in all, 3 when the head is frozen). Formulas: docs/math.md, sections 1, 2.
"""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from ._backend import check_choice, check_targets, resolve
from ._cpu import EXTRA_COLUMNS
from ._head import ChunkedHead, HeadGradients, HeadInputs, HeadOptions, head_inputs
from ._records import ENTROPY, KL, LOGPROB, TABLE_COLUMNS, TokenLogprobs


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, rows, options, extras = arguments
        inputs = HeadInputs(*tensors)
        ctx.save_for_backward(*tensors, rows)
        ctx.options = options
        ctx.set_materialize_grads(False)
        head = ChunkedHead(inputs, rows, options, keep_logits=False)
        table = torch.empty(rows.numel(), TABLE_COLUMNS)
        for chunk in head.chunks():
            part = None if extras is None else extras[chunk.span]
            head.statistics(chunk, table[chunk.span], part)

        def scatter(column: int) -> Tensor:
            return torch.zeros(inputs.targets.shape).index_copy_(0, rows, table[:, column])

        kl = None if inputs.ref_hidden is None else scatter(KL)
        return scatter(LOGPROB), scatter(ENTROPY), kl

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients):
        *tensors, rows = ctx.saved_tensors
        inputs = HeadInputs(*tensors)
        gradients = HeadGradients(inputs, ctx.needs_input_grad[:3])
        coefficients = torch.zeros(rows.numel(), 3)
        for column, gradient in enumerate(output_gradients):
            if gradient is not None:
                coefficients[:, column] = gradient[rows]
        # Rows that the loss does not use need no logits either.
        active = (coefficients != 0).any(-1).nonzero().squeeze(-1)
        coefficients = coefficients[active]
        head = ChunkedHead(inputs, rows[active], ctx.options, keep_logits=True)
        table = torch.empty(active.numel(), TABLE_COLUMNS)
        for chunk in head.chunks():
            head.statistics(chunk, table[chunk.span])
            head.backward(chunk, table[chunk.span], coefficients[chunk.span], gradients)
        return (*gradients.scaled(), *[None] * 8)


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


def _extra(
    extras: Tensor | None, rows: Tensor, count: int, stats: Collection[str]
) -> dict[str, Tensor]:
    """What `stats` names of extras [n, 3], at its places among `count` rows."""
    if extras is None:
        return {}
    full = extras.new_zeros(count, len(EXTRA_COLUMNS)).index_copy_(0, rows, extras)
    columns = dict(zip(EXTRA_COLUMNS, full.unbind(-1), strict=True))
    columns["is_top1"] = columns["is_top1"] != 0
    return {name: columns[name] for name in reference.EXTRA_STATS if name in stats}


def _shaped(out: TokenLogprobs, shape: torch.Size) -> TokenLogprobs:
    return TokenLogprobs(
        out.logprobs.reshape(shape),
        out.entropy.reshape(shape),
        None if out.kl is None else out.kl.reshape(shape),
        {name: x.reshape(shape) for name, x in out.extra.items()},
    )


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
    never read and give 0. stats: any of "mean_logits", "is_top1", "log_sum_sq_probs" (of the
    tempered logits, without gradient). workspace_mb bounds the logits held at a time (by
    default 320; without a reference half of it is used, without a gradient one tile).

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
        check_choice(op, "stats", name, reference.EXTRA_STATS)
    used = targets != ignore_index
    check_targets(op, targets, used, options.valid_vocab)
    backend = resolve(backend, hidden.device, inputs.temperature.dtype, op=op)
    rows = used.reshape(-1).nonzero().squeeze(-1)
    if backend == "reference":
        out = _reference(inputs, rows, options, stats)
    else:
        extras = torch.empty(rows.numel(), len(EXTRA_COLUMNS)) if stats else None
        logprobs, entropy, kl = _LinearLogprobs.apply(*inputs, rows, options, extras)
        extra = _extra(extras, rows, targets.numel(), stats)
        out = TokenLogprobs(logprobs, entropy, kl, extra)
    return _shaped(out, targets.shape)
