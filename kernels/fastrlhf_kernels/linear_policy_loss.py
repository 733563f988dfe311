"""The policy loss straight from hidden states, its gradient formed in the forward.

The loss of a token is known as soon as its row of logits is, so the gradient is made while the row
is still in the workspace: 3 products with the head, 2 when the head is frozen, plus 1 for an exact
KL; one more for gspo, whose ratio takes all tokens of a sequence. Rows without signal (masked,
clipped, zero advantage) take part in no product of the gradient. Formulas: docs/math.md, sections 1
to 3. No second derivatives, one backward per forward. Here are the checks and the reference, which
is plain torch; what they stand before is in _policy_loss_operator.py.
"""

from dataclasses import replace

import torch
from torch import Tensor

from . import reference, token_losses
from ._backend import check_targets, resolve
from ._head import HeadInputs, HeadOptions, head_inputs
from ._policy_loss_operator import SummedWeightLoss, Tokens, _forward, packed
from ._records import LossOutput, LossStats, PolicyLossSpec
from .policy_loss import check_policy_inputs


def _reference(
    inputs: HeadInputs, rows: Tensor, options: HeadOptions, tokens: Tokens, ratios: tuple
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


def check_weight_grad(op: str, weight: Tensor, weight_grad: Tensor | None) -> None:
    if weight_grad is None:
        return
    fits = weight_grad.shape == weight.shape and weight_grad.device == weight.device
    if not fits or weight_grad.dtype != torch.float32 or not weight_grad.is_contiguous():
        raise ValueError(
            f"{op}: weight_grad is {weight_grad.dtype} {list(weight_grad.shape)} on "
            f"{weight_grad.device}; give a contiguous torch.float32 {list(weight.shape)} on "
            f"{weight.device}"
        )


class Summed(torch.autograd.Function):
    """weight, whose gradient is added to weight_grad in the backward and goes no further."""

    @staticmethod
    def forward(ctx, weight: Tensor, weight_grad: Tensor) -> Tensor:
        ctx.weight_grad = weight_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        ctx.weight_grad.add_(gradient)
        return None, None


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
    weight_grad: Tensor | None = None,
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

    weight_grad: [V, D] float32, to which the gradient in weight is added, when backward has ended
    at the latest; backward then gives weight none. Pass `weight.grad` of a float32 weight: a second
    tensor of its size is never made. The loss must be differentiated as it is: ValueError from
    backward if it was scaled (but on `reference`, which adds in the backward). torch.compile's
    graph breaks here.
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
    check_weight_grad(op, weight, weight_grad)
    check_targets(op, targets, mask, options.valid_vocab)
    dtype = inputs.temperature.dtype
    backend = resolve(backend, hidden.device, dtype, op=op)
    old, advantage = (x.detach().reshape(-1) for x in (old_logprobs, advantages))
    ref = None if ref_logprobs is None else ref_logprobs.detach().reshape(-1)
    if backend == "reference":
        rows = mask.reshape(-1).nonzero().squeeze(-1)
        mean = token_losses.row_mean(mask, spec.aggregation, sequence_ids, num_items, dtype)
        tokens = Tokens.of_valid_rows(spec, old, advantage, mean, ref, rows, has_reference)
        if weight_grad is not None:
            inputs = inputs._replace(weight=Summed.apply(weight, weight_grad))
        return _reference(inputs, rows, options, tokens, (mask, sequence_ids))
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = torch.full((), num_items, dtype=torch.float32, device=hidden.device)
    differentiate = torch.is_grad_enabled()
    needs = [differentiate and x is not None and x.requires_grad for x in inputs[:3]]
    given = (
        *inputs[3:], *options, old, advantage, mask, ref, sequence_ids, num_items, *packed(spec),
        *needs, backend,
    )  # fmt: skip
    if weight_grad is not None and needs[1]:
        out = SummedWeightLoss.apply(*inputs[:3], weight_grad, given)
    else:
        out, *_ = _forward(*inputs[:3], *given)
    loss, *stats = out.unbind()
    return LossOutput(loss, LossStats(*(x.detach() for x in stats)))
