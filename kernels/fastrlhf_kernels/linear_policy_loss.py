"""The policy loss straight from hidden states, its gradient formed in the forward.

The loss of a token is known as soon as its row of logits is, so the gradient is made while the row
is still in the workspace: 3 products with the head, 2 when the head is frozen, plus 1 for an exact
KL; one more for gspo, whose ratio takes all tokens of a sequence. Rows without signal (masked,
clipped, zero advantage) take part in no product of the gradient. Formulas: docs/math.md, sections 1
to 3. No second derivatives, one backward per forward. One custom operator, so that torch.compile
takes it as one node; the reference is plain torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference, token_losses
from ._backend import check_targets, resolve
from ._head import ChunkedHead, HeadGradients, HeadInputs, HeadOptions, head_inputs
from ._records import (
    ENTROPY,
    KL,
    LOGPROB,
    REF_LOGPROB,
    TABLE_COLUMNS,
    LossOutput,
    LossStats,
    PolicyLossSpec,
)
from .audit import visible_to_audit
from .linear_logprobs import statistics_table
from .policy_loss import check_policy_inputs


@dataclass(frozen=True)
class _Tokens:
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
    ) -> "_Tokens":
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
@torch.library.custom_op("fastrlhf::linear_policy_loss", mutates_args=())
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
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    sequence_ids: Tensor | None,
    num_items: Tensor | None,
    names: str,
    numbers: Sequence[float],
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[6] loss and statistics; gradients of hidden, weight, bias in float32, empty if not needed.

    targets, old_logprobs, advantages, ref_logprobs: [N]. mask, sequence_ids: as the caller gave
    them. names, numbers: of `_packed`.
    """
    inputs = HeadInputs(
        hidden, weight, bias, targets, temperature, ref_hidden, ref_weight, ref_bias
    )
    options = HeadOptions(logit_scale, softcap, kl_direction, valid_vocab, workspace_bytes)
    spec = _unpacked(names, numbers)
    rows = mask.reshape(-1).nonzero().squeeze(-1)
    mean = token_losses.row_mean(mask, spec.aggregation, sequence_ids, num_items, torch.float32)
    tokens = _Tokens.of_valid_rows(
        spec, old_logprobs, advantages, mean, ref_logprobs, rows, ref_hidden is not None
    )
    if spec.loss == "gspo":
        # The ratio of a sequence takes all of its tokens: their statistics come first.
        alone = inputs._replace(ref_hidden=None, ref_weight=None, ref_bias=None)
        logprobs = statistics_table(alone, rows, options, False, backend)[0][:, LOGPROB]
        log_ratios = token_losses.sequence_log_ratios(
            logprobs, tokens.old_logprobs, mask, sequence_ids
        )
        tokens = replace(tokens, log_ratios=log_ratios)
    needs = (needs_hidden, needs_weight, needs_bias)
    table, gradients = _loss_in_forward(inputs, rows, options, tokens, needs, backend)
    out = tokens.loss_and_stats(table)
    return (out, *(hidden.new_empty(0) if x is None else x for x in gradients))  # type: ignore[return-value]


def _loss_in_forward(
    inputs: HeadInputs,
    rows: Tensor,
    options: HeadOptions,
    tokens: _Tokens,
    needs: tuple[bool, bool, bool],
    backend: str,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The table of `rows`, and the float32 gradients of hidden, weight and bias."""
    if backend == "triton":
        from ._triton_loss import loss_in_forward

        return loss_in_forward(inputs, rows, options, tokens, needs)
    gradients = HeadGradients(inputs, needs)
    head = ChunkedHead(inputs, rows, options, keep_logits=gradients.needed())
    table = torch.empty(rows.numel(), TABLE_COLUMNS, dtype=torch.float32, device=rows.device)
    for chunk in head.chunks():
        part = table[chunk.span]
        head.statistics(chunk, part)
        if gradients.needed():
            head.backward(chunk, part, tokens.coefficients(part, chunk.span), gradients)
    return table, (gradients.hidden, gradients.weight, gradients.bias)


def _packed(spec: PolicyLossSpec) -> tuple[str, list[float]]:
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
def _(hidden, weight, bias, *options):
    needs = options[-4:-1]

    def buffer(x: Tensor | None, needed: bool) -> Tensor:
        shape = x.shape if needed and x is not None else (0,)
        return hidden.new_empty(shape, dtype=torch.float32 if needed else hidden.dtype)

    gradients = (buffer(x, n) for x, n in zip((hidden, weight, bias), needs, strict=True))
    return (hidden.new_empty(6, dtype=torch.float32), *gradients)


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


def _reference(
    inputs: HeadInputs, rows: Tensor, options: HeadOptions, tokens: _Tokens, ratios: tuple
) -> LossOutput[LossStats]:
    ref_hidden = None if inputs.ref_hidden is None else inputs.ref_hidden[rows]
    found, ref_logprobs = reference.linear_statistics(
        inputs.hidden[rows], inputs.weight, inputs.bias, inputs.targets[rows],
        inputs.temperature[rows], ref_hidden, inputs.ref_weight, inputs.ref_bias,
        logit_scale=options.logit_scale, softcap=options.softcap, valid_vocab=options.valid_vocab,
        kl_direction=options.kl_direction,
    )  # fmt: skip
    if tokens.spec.loss == "gspo":
        log_ratios = token_losses.sequence_log_ratios(found.logprobs, tokens.old_logprobs, *ratios)
        tokens = replace(tokens, log_ratios=log_ratios)
    losses = tokens.losses(found.logprobs, found.entropy, found.kl, ref_logprobs)
    return token_losses.reduce_policy_rows(losses, tokens.mean)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    spec: PolicyLossSpec,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_direction: str = "forward",
    valid_vocab: int | None = None,
    sequence_ids: Tensor | None = None,
    num_items: int | Tensor | None = None,
    workspace_mb: float | None = None,
    backend: str = "auto",
) -> LossOutput[LossStats]:
    """`policy_loss(linear_logprobs(hidden, weight, targets).logprobs, old_logprobs, ...)`, fused.

    hidden, weight, targets, bias, logit_scale, temperature, softcap, ref_hidden, ref_weight,
    ref_bias, kl_direction, valid_vocab, workspace_mb: as in `linear_logprobs`. old_logprobs,
    advantages, mask, ref_logprobs, sequence_ids: shaped like targets; spec, num_items: as in
    `policy_loss`. Rows with mask False are never read. spec.kl_estimator "exact" needs ref_hidden;
    "k2" and "k3" take ref_logprobs, or find them from ref_hidden.

    Differentiable in hidden, weight and bias, once, except on `reference`; only what requires a
    gradient is worked on. Gradients are summed in float32. Raises ValueError, with the shapes, for
    what does not fit. Source: docs/math.md, sections 1 to 3.
    """
    op = "linear_policy_loss"
    inputs, options = head_inputs(
        op, hidden, weight, targets, bias, temperature, ref_hidden, ref_weight, ref_bias,
        logit_scale=logit_scale, softcap=softcap, kl_direction=kl_direction,
        valid_vocab=valid_vocab, workspace_mb=workspace_mb,
    )  # fmt: skip
    has_reference = ref_hidden is not None
    check_policy_inputs(
        op, targets, old_logprobs, advantages, mask, spec, ref_logprobs=ref_logprobs,
        has_entropy=True, has_kl=has_reference,
        has_ref_logprobs=has_reference or ref_logprobs is not None,
        sequence_ids=sequence_ids, num_items=num_items,
    )  # fmt: skip
    check_targets(op, targets, mask, options.valid_vocab)
    dtype = inputs.temperature.dtype
    backend = resolve(backend, hidden.device, dtype, op=op)
    old, advantage = (x.detach().reshape(-1) for x in (old_logprobs, advantages))
    ref = None if ref_logprobs is None else ref_logprobs.detach().reshape(-1)
    if backend == "reference":
        rows = mask.reshape(-1).nonzero().squeeze(-1)
        mean = token_losses.row_mean(mask, spec.aggregation, sequence_ids, num_items, dtype)
        tokens = _Tokens.of_valid_rows(spec, old, advantage, mean, ref, rows, has_reference)
        return _reference(inputs, rows, options, tokens, (mask, sequence_ids))
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = torch.full((), num_items, dtype=torch.float32, device=hidden.device)
    differentiate = torch.is_grad_enabled()
    needs = [differentiate and x is not None and x.requires_grad for x in inputs[:3]]
    out, *_ = _forward(
        *inputs, *options, old, advantage, mask, ref, sequence_ids, num_items, *_packed(spec),
        *needs, backend,
    )  # fmt: skip
    loss, *stats = out.unbind()
    return LossOutput(loss, LossStats(*(x.detach() for x in stats)))
