"""The operator behind `linear_policy_loss`: a loss whose gradient is made in the forward.

Two of them: one gives the gradient in the weight back, the other (`_forward_`) adds it to a tensor
that is there already, where it will be added in the end, so that no second one of its size is
alive. Each is one node for torch.compile; arguments that no schema knows are packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import token_losses
from ._backend import WAITS
from ._head import ChunkedHead, HeadGradients, HeadInputs, HeadOptions
from ._records import ENTROPY, KL, LOGPROB, REF_LOGPROB, TABLE_COLUMNS, PolicyLossSpec
from .audit import visible_to_audit
from .linear_logprobs import statistics_table

# HeadInputs, HeadOptions; what makes the loss ([N] each, mask and sequence_ids as the caller gave
# them); `packed`; what takes a gradient.
ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor temperature, "
    "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, "
    "float logit_scale, float? softcap, str kl_direction, SymInt valid_vocab, "
    "SymInt workspace_bytes, Tensor old_logprobs, Tensor advantages, Tensor mask, "
    "Tensor? ref_logprobs, Tensor? sequence_ids, Tensor? num_items, str names, float[] numbers, "
    "bool needs_hidden, bool needs_weight, bool needs_bias, str backend"
)


@dataclass(frozen=True)
class Tokens:
    """What turns token statistics into a loss; every tensor holds the [n] valid rows only."""

    spec: PolicyLossSpec
    old_logprobs: Tensor
    advantages: Tensor
    mean: token_losses.RowMean
    ref_logprobs: Tensor | None
    has_reference: bool
    log_ratios: Tensor | None = None  # of the sequences, for gspo

    @classmethod
    def of_valid_rows(
        cls,
        spec: PolicyLossSpec,
        old_logprobs: Tensor,
        advantages: Tensor,
        mean: token_losses.RowMean,
        ref_logprobs: Tensor | None,
        rows: Tensor,
        has_reference: bool,
    ) -> "Tokens":
        def valid(x: Tensor) -> Tensor:
            return x.detach()[rows].to(mean.weights.dtype)

        ref = None if ref_logprobs is None else valid(ref_logprobs)
        return cls(spec, valid(old_logprobs), valid(advantages), mean, ref, has_reference)

    def losses(
        self, logprobs: Tensor, entropy: Tensor, kl: Tensor | None, ref: Tensor | None
    ) -> token_losses.PolicyRows:
        return token_losses.policy_rows(
            self.spec, logprobs, self.old_logprobs, self.advantages, entropy=entropy, kl=kl,
            ref_logprobs=ref if self.ref_logprobs is None else self.ref_logprobs,
            sequence_log_ratios=self.log_ratios,
        )  # fmt: skip

    def loss_and_stats(self, table: Tensor) -> Tensor:
        """[6]: the loss and its statistics, from the statistics of all rows."""
        kl, ref = (table[:, KL], table[:, REF_LOGPROB]) if self.has_reference else (None, None)
        rows = self.losses(table[:, LOGPROB], table[:, ENTROPY], kl, ref)
        return torch.stack([self.mean(x) for x in rows])

    def coefficients(self, table: Tensor, span: slice) -> Tensor:
        """[n, 3] derivatives of the loss in the log-probability, entropy and KL of rows `span`."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[span]

        ref = part(self.ref_logprobs)
        if ref is None and self.has_reference:
            ref = table[:, REF_LOGPROB]
        derivatives = token_losses.policy_derivatives(
            self.spec, table[:, LOGPROB], self.old_logprobs[span], self.advantages[span],
            ref_logprobs=ref, sequence_log_ratios=part(self.log_ratios),
        )  # fmt: skip
        return derivatives * (self.mean.weights[span] / self.mean.num_items)[:, None]


@visible_to_audit
@torch.library.custom_op(
    "fastrlhf::linear_policy_loss",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def _forward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[6] loss and statistics; float32 gradients of hidden, weight, bias, empty if not needed."""
    return _compute(given)


@visible_to_audit
@torch.library.custom_op(
    "fastrlhf::linear_policy_loss_",
    mutates_args=("weight_grad",),
    schema=f"(Tensor(a!) weight_grad, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=WAITS,
)
def _forward_(weight_grad: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`_forward`, but the gradient of weight is added to weight_grad, [V, D] float32."""
    out, hidden, _, bias = _compute(given, weight_grad)
    return out, hidden, bias


def _compute(
    given: Sequence[Any], weight_grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_forward` returns; weight_grad itself for the gradient of weight, if it is given."""
    inputs, options = HeadInputs(*given[:8]), HeadOptions(*given[8:13])
    old_logprobs, advantages, mask, ref_logprobs, sequence_ids, num_items = given[13:19]
    names, numbers, *needs, backend = given[19:]
    spec = _unpacked(names, numbers)
    rows = mask.reshape(-1).nonzero().squeeze(-1)
    mean = token_losses.row_mean(mask, spec.aggregation, sequence_ids, num_items, torch.float32)
    has_reference = inputs.ref_hidden is not None
    tokens = Tokens.of_valid_rows(
        spec, old_logprobs, advantages, mean, ref_logprobs, rows, has_reference
    )
    if spec.loss == "gspo":
        # The ratio of a sequence takes all of its tokens: their statistics come first.
        alone = inputs._replace(ref_hidden=None, ref_weight=None, ref_bias=None)
        logprobs = statistics_table(alone, rows, options, False, backend)[0][:, LOGPROB]
        log_ratios = token_losses.sequence_log_ratios(
            logprobs, tokens.old_logprobs, mask, sequence_ids
        )
        tokens = replace(tokens, log_ratios=log_ratios)
    gradients = HeadGradients(inputs, tuple(needs), weight_grad)
    table = _loss_in_forward(inputs, rows, options, tokens, gradients, backend)
    out, empty = tokens.loss_and_stats(table), inputs.hidden.new_empty
    made = (gradients.hidden, gradients.weight, gradients.bias)
    return (out, *(empty(0) if x is None else x for x in made))  # type: ignore[return-value]


def _loss_in_forward(
    inputs: HeadInputs,
    rows: Tensor,
    options: HeadOptions,
    tokens: Tokens,
    gradients: HeadGradients,
    backend: str,
) -> Tensor:
    """The table of `rows`; adds to the gradients of hidden, weight and bias."""
    if backend == "triton":
        from ._triton_loss import loss_in_forward

        return loss_in_forward(inputs, rows, options, tokens, gradients)
    head = ChunkedHead(inputs, rows, options, keep_logits=gradients.needed())
    table = torch.empty(rows.numel(), TABLE_COLUMNS, dtype=torch.float32, device=rows.device)
    for chunk in head.chunks():
        part = table[chunk.span]
        head.statistics(chunk, part)
        if gradients.needed():
            head.backward(chunk, part, tokens.coefficients(part, chunk.span), gradients)
    return table


def packed(spec: PolicyLossSpec) -> tuple[str, list[float]]:
    """A spec in types that an operator's schema knows."""
    names = (spec.loss, spec.kl_estimator, spec.aggregation)
    bound = torch.inf if spec.dual_clip is None else spec.dual_clip
    numbers = (spec.cliprange_low, spec.cliprange_high, bound)
    return " ".join(names), [*numbers, spec.kl_coef, spec.old_kl_coef, spec.entropy_coef]


def _unpacked(names: str, numbers: Sequence[float]) -> PolicyLossSpec:
    loss, estimator, aggregation = names.split(" ")
    low, high, bound, kl_coef, old_kl_coef, entropy_coef = numbers
    return PolicyLossSpec(
        loss, low, high, None if bound == torch.inf else bound, kl_coef, estimator, old_kl_coef,
        entropy_coef, aggregation,
    )  # fmt: skip


@_forward.register_fake
def _fake(*given):
    inputs, needs = given[:3], given[-4:-1]
    hidden = inputs[0]

    def buffer(x: Tensor | None, needed: bool) -> Tensor:
        shape = x.shape if needed and x is not None else (0,)
        return hidden.new_empty(shape, dtype=torch.float32 if needed else hidden.dtype)

    gradients = (buffer(x, n) for x, n in zip(inputs, needs, strict=True))
    return (hidden.new_empty(6, dtype=torch.float32), *gradients)


@_forward_.register_fake
def _(weight_grad, *given):
    needs_hidden, _, needs_bias, backend = given[-4:]
    out, hidden, _, bias = _fake(*given[:-4], needs_hidden, False, needs_bias, backend)
    return out, hidden, bias


def _setup_context(ctx, inputs, output):
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.count = len(inputs)
    ctx.gradients = output[1:]
    ctx.mark_non_differentiable(*output[1:])
    # The others would arrive as zeros of their own size.
    ctx.set_materialize_grads(False)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x·factor, in the place of x; a compiler's stand-ins for tensors do not allow that."""
    return x.mul_(factor) if type(x) is Tensor else x * factor


def _autograd(ctx, gradient, *_):
    # Given away, not copied: autograd then keeps the accumulator itself as the gradient.
    given, ctx.gradients = ctx.gradients, None
    if given is None:
        raise RuntimeError("linear_policy_loss: backward was already called; run it again")
    gradients = [
        _scaled(x, gradient[0]).to(dtype) if needed else None
        for x, dtype, needed in zip(given, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    ]
    return (*gradients, *[None] * (ctx.count - 3))


_forward.register_autograd(_autograd, setup_context=_setup_context)


class SummedWeightLoss(torch.autograd.Function):
    """`_forward_`, differentiable in hidden and bias: weight has its share when the loss is made.

    That share is of the loss as it is, so backward takes no other gradient than 1. (weight is an
    argument so that the loss can be differentiated where hidden and bias are constants.)
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, weight_grad, given):
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, bias)]
        out, *ctx.gradients = _forward_(weight_grad, hidden, weight, bias, *given)
        return out

    @staticmethod
    def backward(ctx, gradient):
        given, ctx.gradients = ctx.gradients, None
        if given is None:
            raise RuntimeError("linear_policy_loss: backward was already called; run it again")
        # Waits for a GPU, as the forward does for every chunk.
        if gradient.device.type != "meta" and gradient[0] != 1:
            raise ValueError(
                f"linear_policy_loss: the loss was multiplied by {float(gradient[0])}, but its "
                "gradient is in weight_grad already; differentiate it as it is, or leave "
                "weight_grad out"
            )
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        hidden, bias = (
            x.to(dtype) if needed else None
            for x, dtype, needed in zip(given, ctx.dtypes, needs, strict=True)
        )
        return hidden, None, bias, None, None
