"""The policy loss straight from hidden states, its gradient formed in the forward.

The loss of a token is known as soon as its row of logits is, so the gradient is made while the row
is still in the workspace: 3 products with the head, 2 when the head is frozen, plus 1 for an exact
KL. Rows without signal (masked, clipped, zero advantage) take part in no product of the gradient.
Formulas: docs/math.md, sections 1 to 3. No second derivatives, one backward per forward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
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
from .policy_loss import check_policy_inputs


@dataclass(frozen=True)
class _Policy:
    """What turns token statistics into a loss; every tensor holds the [n] valid rows only."""

    spec: PolicyLossSpec
    old_logprobs: Tensor
    advantages: Tensor
    mean: reference.RowMean
    ref_logprobs: Tensor | None
    rows: Tensor  # their places among the N rows
    has_reference: bool
    options: HeadOptions
    differentiate: bool

    @classmethod
    def of_valid_rows(
        cls,
        spec: PolicyLossSpec,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logprobs: Tensor | None,
        mean: reference.RowMean,
        options: HeadOptions,
        has_reference: bool,
    ) -> "_Policy":
        rows = mask.reshape(-1).nonzero().squeeze(-1)

        def valid(x: Tensor) -> Tensor:
            return x.detach().reshape(-1)[rows].to(mean.weights.dtype)

        ref = None if ref_logprobs is None else valid(ref_logprobs)
        return cls(
            spec, valid(old_logprobs), valid(advantages), mean, ref, rows, has_reference, options,
            torch.is_grad_enabled(),
        )  # fmt: skip

    def token_losses(
        self, logprobs: Tensor, entropy: Tensor, kl: Tensor | None, ref: Tensor | None, span: slice
    ) -> reference.PolicyRows:
        if self.ref_logprobs is not None:
            ref = self.ref_logprobs[span]
        return reference.policy_rows(
            self.spec, logprobs, self.old_logprobs[span], self.advantages[span],
            entropy=entropy, kl=kl, ref_logprobs=ref,
        )  # fmt: skip

    def from_table(self, leaves: list[Tensor], ref: Tensor, span: slice) -> reference.PolicyRows:
        logprobs, entropy, kl = leaves
        if not self.has_reference:
            return self.token_losses(logprobs, entropy, None, None, span)
        return self.token_losses(logprobs, entropy, kl, ref, span)

    def coefficients(self, table: Tensor, span: slice) -> Tensor:
        """[n, 3] derivatives of the loss in each row's log-probability, entropy and KL."""
        with torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in _statistics(table)]
            rows = self.from_table(leaves, table[:, REF_LOGPROB], span)
            total = self.mean(rows.loss, span)
            return torch.stack(
                torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True), -1
            )


def _statistics(table: Tensor) -> list[Tensor]:
    return [table[:, column] for column in (LOGPROB, ENTROPY, KL)]


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, inputs, policy):
        inputs = inputs._replace(hidden=hidden, weight=weight, bias=bias)
        needs = tuple(policy.differentiate and needed for needed in ctx.needs_input_grad[:3])
        gradients = HeadGradients(inputs, needs)
        head = ChunkedHead(inputs, policy.rows, policy.options, keep_logits=gradients.needed())
        table = torch.empty(policy.rows.numel(), TABLE_COLUMNS)
        for chunk in head.chunks():
            part = table[chunk.span]
            head.statistics(chunk, part)
            if gradients.needed():
                head.backward(chunk, part, policy.coefficients(part, chunk.span), gradients)
        ctx.gradients = gradients
        rows = policy.from_table(_statistics(table), table[:, REF_LOGPROB], slice(None))
        loss, stats = reference.reduce_policy_rows(rows, policy.mean)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, *_):
        # Given away, not copied: autograd then keeps the accumulator itself as the gradient.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_policy_loss: backward was already called; run it again")
        return (*gradients.scaled(loss_gradient), None, None)


def _reference(inputs: HeadInputs, policy: _Policy) -> LossOutput[LossStats]:
    rows, options = policy.rows, policy.options
    ref_hidden = None if inputs.ref_hidden is None else inputs.ref_hidden[rows]
    tokens, ref_logprobs = reference.linear_statistics(
        inputs.hidden[rows], inputs.weight, inputs.bias, inputs.targets[rows],
        inputs.temperature[rows], ref_hidden, inputs.ref_weight, inputs.ref_bias,
        logit_scale=options.logit_scale, softcap=options.softcap, valid_vocab=options.valid_vocab,
        kl_direction=options.kl_direction,
    )  # fmt: skip
    token_losses = policy.token_losses(
        tokens.logprobs, tokens.entropy, tokens.kl, ref_logprobs, slice(None)
    )
    return reference.reduce_policy_rows(token_losses, policy.mean)


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

    Differentiable in hidden, weight and bias, once on the `cpu` backend; only what requires a
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
    mean = reference.row_mean(mask, spec.aggregation, sequence_ids, num_items, dtype)
    policy = _Policy.of_valid_rows(
        spec, old_logprobs, advantages, mask, ref_logprobs, mean, options, has_reference
    )
    if resolve(backend, hidden.device, dtype, op=op) == "reference":
        return _reference(inputs, policy)
    loss, *stats = _LinearPolicyLoss.apply(inputs.hidden, weight, bias, inputs, policy)
    return LossOutput(loss, LossStats(*stats))
