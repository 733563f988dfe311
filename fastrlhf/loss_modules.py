"""The fused ops as `nn.Module`s, for a training loop of one's own.

A module keeps what stays the same over a run (the spec, the temperature, the head's options);
`forward` takes what a step brings. They have no parameters and no state. Each is the op of
`fastrlhf_kernels` that its docstring names, with the same shapes, errors and gradients.

A head is a module with a `weight` [V, D] and perhaps a `bias` [V], such as `model.lm_head` or a
tied embedding, or the weight itself. Refused is a head whose `weight` is not what it multiplies by:
one that is quantised, or that carries an adapter.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from fastrlhf_kernels import (
    LossOutput,
    LossStats,
    PolicyLossSpec,
    TokenLogprobs,
    ValueStats,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    value_loss,
)

__all__ = ["LinearLogprobs", "LinearPolicyLoss", "PolicyLoss", "ValueLoss", "head_tensors"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def head_tensors(head: nn.Module | Tensor) -> tuple[Tensor, Tensor | None]:
    """`(head.weight, head.bias)`: [V, D] and [V] or None.

    Raises TypeError for a head without a weight, one that is quantised and one with an adapter.
    """
    name = "the head's weight" if isinstance(head, Tensor) else type(head).__name__
    if hasattr(head, "base_layer"):
        raise TypeError(
            f"{name} carries an adapter, which its weight does not contain; merge the adapter, or "
            "leave the head out of target_modules (modules_to_save trains a whole head)"
        )
    weight = head if isinstance(head, Tensor) else getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"a head has a weight [V, D], and {name} has none; pass model.lm_head")
    # bitsandbytes marks its weights with quant_state (4 bits) and SCB (8 bits).
    marked = any(hasattr(weight, mark) for mark in ("quant_state", "SCB"))
    if marked or weight.dtype not in DTYPES:
        raise TypeError(
            f"{name} is quantised ({type(weight).__name__}, {weight.dtype}), and its weight is not "
            "what it multiplies by; keep the head out of quantization (transformers: "
            "BitsAndBytesConfig(llm_int8_skip_modules=['lm_head'])), or pass a dequantised weight"
        )
    return weight, getattr(head, "bias", None)


class _OnHead(nn.Module):
    """The options of a head, which both ops on hidden states take."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        kl_direction: str = "forward",
        valid_vocab: int | None = None,
        workspace_mb: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.kl_direction = kl_direction
        self.valid_vocab = valid_vocab
        self.workspace_mb = workspace_mb
        self.backend = backend

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, softcap={self.softcap}, backend={self.backend!r}"


class LinearLogprobs(_OnHead):
    """`fastrlhf_kernels.linear_logprobs` as a module: the statistics of tokens without logits.

    Example: `LinearLogprobs(temperature=0.8)(hidden, model.lm_head, targets).logprobs`.
    The options are those of the op.
    """

    def forward(
        self,
        hidden: Tensor,
        head: nn.Module | Tensor,
        targets: Tensor,
        *,
        ref_hidden: Tensor | None = None,
        ref_head: nn.Module | Tensor | None = None,
        ignore_index: int = -100,
        stats: Collection[str] = (),
    ) -> TokenLogprobs:
        """hidden: [..., D]; head: [V, D]; targets: [...] int64. Results have the shape of targets.

        ref_hidden gives the exact KL to a reference with the head `ref_head`, or with the same head
        where that is None. Raises as `linear_logprobs` does, and TypeError for a head that is
        quantised or carries an adapter.
        """
        weight, bias = head_tensors(head)
        ref_weight, ref_bias = (None, None) if ref_head is None else head_tensors(ref_head)
        return linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            logit_scale=self.logit_scale,
            temperature=self.temperature,
            softcap=self.softcap,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            kl_direction=self.kl_direction,
            valid_vocab=self.valid_vocab,
            ignore_index=ignore_index,
            stats=stats,
            workspace_mb=self.workspace_mb,
            backend=self.backend,
        )


class LinearPolicyLoss(_OnHead):
    """`fastrlhf_kernels.linear_policy_loss` as a module: the loss straight from hidden states.

    Example: `loss, stats = LinearPolicyLoss(PolicyLossSpec(kl_coef=0.05))(hidden, model.lm_head,
    targets, old_logprobs, advantages, mask, ref_logprobs=...)`. The options are those of the op.
    """

    def __init__(
        self,
        spec: PolicyLossSpec,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        kl_direction: str = "forward",
        valid_vocab: int | None = None,
        workspace_mb: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            kl_direction=kl_direction,
            valid_vocab=valid_vocab,
            workspace_mb=workspace_mb,
            backend=backend,
        )
        self.spec = spec

    def forward(
        self,
        hidden: Tensor,
        head: nn.Module | Tensor,
        targets: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_head: nn.Module | Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> LossOutput[LossStats]:
        """hidden: [..., D]; head: [V, D]; all others [...], mask bool, True = trains.

        num_items is the denominator of the whole minibatch, so that microbatches add up; None
        counts this call. Raises as `linear_policy_loss` does, and TypeError for a head that is
        quantised or carries an adapter.
        """
        weight, bias = head_tensors(head)
        ref_weight, ref_bias = (None, None) if ref_head is None else head_tensors(ref_head)
        return linear_policy_loss(
            hidden,
            weight,
            targets,
            old_logprobs,
            advantages,
            mask,
            self.spec,
            bias=bias,
            logit_scale=self.logit_scale,
            temperature=self.temperature,
            softcap=self.softcap,
            ref_logprobs=ref_logprobs,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            kl_direction=self.kl_direction,
            valid_vocab=self.valid_vocab,
            sequence_ids=sequence_ids,
            num_items=num_items,
            workspace_mb=self.workspace_mb,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.spec}, {super().extra_repr()}"


class PolicyLoss(nn.Module):
    """`fastrlhf_kernels.policy_loss` as a module, for log-probabilities that are there already."""

    def __init__(self, spec: PolicyLossSpec, *, backend: str = "auto") -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        entropy: Tensor | None = None,
        kl: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> LossOutput[LossStats]:
        """All tensors have one shape, mask is bool, True = trains. Raises as `policy_loss` does."""
        return policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            self.spec,
            ref_logprobs=ref_logprobs,
            entropy=entropy,
            kl=kl,
            sequence_ids=sequence_ids,
            num_items=num_items,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return str(self.spec)


class ValueLoss(nn.Module):
    """`fastrlhf_kernels.value_loss` as a module; the caller multiplies by vf_coef."""

    def __init__(self, cliprange_value: float | None = 0.2, *, backend: str = "auto") -> None:
        super().__init__()
        self.cliprange_value = cliprange_value
        self.backend = backend

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        mask: Tensor,
        *,
        num_items: int | Tensor | None = None,
    ) -> LossOutput[ValueStats]:
        """All tensors have one shape, mask is bool, True = trains. Raises as `value_loss` does."""
        return value_loss(
            values,
            old_values,
            returns,
            mask,
            cliprange_value=self.cliprange_value,
            num_items=num_items,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"cliprange_value={self.cliprange_value}"
