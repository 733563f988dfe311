"""The ops in plain torch: the specification, and the backend for every device without kernels.

float32 inside (float64 when an input is), differentiable by autograd. The losses of tokens, which
need no vocabulary, are in token_losses.py. Unlike the kernels, these functions hold [N, V] tensors.
Formulas: docs/math.md, sections 1 to 5.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ._records import TokenLogprobs


def _at_least(x: Tensor, bound: float) -> Tensor:
    """max(x, bound) that passes the gradient on: the clamp only undoes rounding."""
    return x + (bound - x.detach()).clamp(min=0)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
) -> Tensor:
    """[n, valid_vocab] tempered logits in the dtype of `temperature` [n]."""
    dtype = temperature.dtype
    # Autocast would round the logits to bfloat16 on their way into the softmax.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight[:valid_vocab].to(dtype).t()
        if bias is not None:
            logits = logits + bias[:valid_vocab].to(dtype)
        logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits / temperature[:, None]


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    *,
    kl_direction: str,
    stats: Collection[str] = (),
) -> tuple[TokenLogprobs, Tensor | None]:
    """Statistics of [n, V] tempered logits, and the reference's log-probability of the target."""
    log_probs = logits.log_softmax(-1)
    # P·ℓ of a masked column is 0, not 0·(−∞).
    absent = logits == -torch.inf
    entropy = -(log_probs.exp() * log_probs.masked_fill(absent, 0)).sum(-1)
    logprobs = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    kl = ref_logprobs = None
    if ref_logits is not None:
        ref_log_probs = ref_logits.log_softmax(-1)
        ref_logprobs = ref_log_probs.gather(-1, targets[:, None]).squeeze(-1)
        if kl_direction == "forward":
            gap = (log_probs - ref_log_probs).masked_fill(absent, 0)
            kl = (log_probs.exp() * gap).sum(-1)
        else:
            gap = (ref_log_probs - log_probs).masked_fill(ref_logits == -torch.inf, 0)
            kl = (ref_log_probs.exp() * gap).sum(-1)
        kl = _at_least(kl, 0.0)
    extra = {}
    with torch.no_grad():
        if "mean_logits" in stats:
            extra["mean_logits"] = logits.mean(-1)
        if "is_top1" in stats:
            extra["is_top1"] = logits.argmax(-1) == targets
        if "log_sum_sq_probs" in stats:
            extra["log_sum_sq_probs"] = (2 * log_probs).logsumexp(-1)
    return TokenLogprobs(logprobs, _at_least(entropy, 0.0), kl, extra), ref_logprobs


def among_zeros(out: TokenLogprobs, rows: Tensor, shape: torch.Size) -> TokenLogprobs:
    """Statistics of `rows` at their places among the flattened rows of `shape`, and 0 elsewhere."""

    def put(x: Tensor) -> Tensor:
        return x.new_zeros(shape.numel()).index_copy(0, rows, x).reshape(shape)

    kl = None if out.kl is None else put(out.kl)
    extra = {name: put(x) for name, x in out.extra.items()}
    return TokenLogprobs(put(out.logprobs), put(out.entropy), kl, extra)


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int,
    kl_direction: str,
    stats: Collection[str] = (),
) -> tuple[TokenLogprobs, Tensor | None]:
    """`token_statistics` of the head's logits for [n, D] rows, all of them valid."""
    ref_logits = None
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias
        with torch.no_grad():
            ref_logits = head_logits(
                ref_hidden, ref_weight, ref_bias, temperature,
                logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab,
            )  # fmt: skip
    logits = head_logits(
        hidden, weight, bias, temperature,
        logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab,
    )  # fmt: skip
    return token_statistics(logits, targets, ref_logits, kl_direction=kl_direction, stats=stats)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """[B, T] advantages and returns, from the last token to the first."""
    advantages = torch.zeros_like(rewards)
    next_value = rewards.new_zeros(rewards.shape[0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(rewards.shape[1] - 1, -1, -1):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(valid, advantage, 0)
        # A masked token is skipped: what lies before it sees what lies after it.
        next_value = torch.where(valid, values[:, t], next_value)
        next_advantage = torch.where(valid, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0)


class Moments(NamedTuple):
    """Of the entries that a mask keeps."""

    mean: Tensor
    rstd: Tensor
    """rsqrt(unbiased variance + 1e-8)"""


def masked_moments(x: Tensor, mask: Tensor) -> Moments:
    """Mean and reciprocal deviation of x[mask], each 0-dim; the variance of one entry is 0."""
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum() / count.clamp(min=1)
    variance = torch.where(mask, x - mean, 0).square().sum() / (count - 1).clamp(min=1)
    return Moments(mean, torch.rsqrt(variance + 1e-8))


def whiten(x: Tensor, mask: Tensor, center: bool) -> Tensor:
    """Masked (x − mean)·rsqrt(var + 1e-8), with the mean added back unless `center`."""
    mean, rstd = masked_moments(x, mask)
    whitened = (x - mean) * rstd
    return torch.where(mask, whitened if center else whitened + mean, 0)


def sample(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Inverse CDF in float64 of [B, V] logits at `uniform` [B] in [0, 1)."""
    if logits.device.type == "mps":  # which has no float64
        tokens, logprobs = sample(logits.cpu(), temperature.cpu(), uniform.cpu(), top_k, top_p)
        return tokens.to(logits.device), logprobs.to(logits.device)
    scaled = logits.double() / temperature.double()[:, None]
    log_probs = scaled.log_softmax(-1)
    kept = scaled
    if top_k:
        smallest = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1).values[:, -1:]
        kept = kept.masked_fill(scaled < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = kept.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p, so the first one always does.
        dropped = ordered.cumsum(-1) - ordered >= top_p
        kept = kept.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    probs = kept.softmax(-1)
    cumulative = probs.cumsum(-1)
    tokens = torch.searchsorted(
        cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True
    )
    # Rounding may carry u past the last step of the CDF: the last possible token is meant.
    positions = torch.arange(probs.shape[-1], device=probs.device)
    last = torch.where(probs > 0, positions, 0).amax(-1, keepdim=True)
    tokens = tokens.minimum(last)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tokens.squeeze(-1), log_probs.gather(-1, tokens).squeeze(-1).to(dtype)
