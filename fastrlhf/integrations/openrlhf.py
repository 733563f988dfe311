"""Our fused head in OpenRLHF's Actor: log-probabilities and entropy without [B, T, V] logits.

`patch()` replaces `openrlhf.models.actor.Actor.forward`, which the PPO, DPO and SFT trainers call.
The model runs as it is, through its DeepSpeed engine and its adapters; only its output layer is
given a single row, and what the other rows hold goes to our op. Calls that ask for logits go to
OpenRLHF's own forward, because logits are what they want.

Deviations from OpenRLHF's forward: logits are float32 also where the model is bfloat16; tokens that
no caller reads (padding, and with an action mask what lies outside it) have log-probability and
entropy 0; the returned output holds no logits.

Supports OpenRLHF 0.11.x, tried with the Actor of 0.11.2 on a CPU, with stand-ins for deepspeed and
flash-attn, which do not install there. Not yet run: a training run. Refused: vision-language
actors, ring attention, a head that is split, quantised, adapted or under ZeRO-3, and a compiled
engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_world_size

from fastrlhf_kernels import TokenLogprobs, linear_logprobs

from ..loss_modules import head_tensors
from . import Applied, Package, Patch, Replacement

__all__ = ["actor_forward", "patch", "unpatch"]

OPENRLHF = Package("openrlhf", series="0.11", tried=("0.11.2",))
SIGNATURE = (
    "self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits",
    "return_logprobs", "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs",
)  # fmt: skip
UNPATCH = "or call fastrlhf.integrations.openrlhf.unpatch()"


@contextmanager
def head_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, `head` gets one row, and the list all rows that it was to get."""
    seen: list[Tensor] = []

    def first_row(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(arguments[0])
        return (arguments[0][:1, :1], *arguments[1:])

    handle = head.register_forward_pre_hook(first_row)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Head:
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> _Head:
        from ..logit_scale import declared_scale, declared_softcap

        # A DeepSpeed engine's config is its own; the model's is below.
        inner = getattr(model, "module", model)
        head = inner.get_output_embeddings()
        weight, bias = head_tensors(head)
        vocabulary = inner.config.get_text_config().vocab_size
        if getattr(weight, "ds_status", None) is not None:
            raise RuntimeError(f"ZeRO-3 keeps the head's weight in parts: use ZeRO-2, {UNPATCH}")
        if weight.shape[0] < vocabulary:
            raise RuntimeError(
                f"the head holds {weight.shape[0]} of {vocabulary} tokens, split by tensor "
                f"parallelism: use ds_tensor_parallel_size=1, {UNPATCH}"
            )
        config = inner.config
        # Whether that is all that the model does, `check` sees on its own forward.
        return cls(weight, bias, declared_scale(config), declared_softcap(config))

    def tokens(self, hidden: Tensor, targets: Tensor, temperature: float) -> TokenLogprobs:
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_logprobs(
                hidden, self.weight, targets, bias=self.bias, logit_scale=self.logit_scale,
                softcap=self.softcap, temperature=temperature,
            )  # fmt: skip

    def check(self, hidden: Tensor, logits: Tensor) -> None:
        """Raise RuntimeError unless `logits` are this head's, of the same single row."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            mine = hidden.float() @ self.weight.float().t()
            mine = (mine if self.bias is None else mine + self.bias.float()) * self.logit_scale
            if self.softcap is not None:
                mine = self.softcap * torch.tanh(mine / self.softcap)
            gap = (mine - logits.float()).norm() / mine.norm()
        # bfloat16 logits are off by 0.2 %.
        if not gap < 0.02:
            raise RuntimeError(
                f"the model's logits differ from its head's by {float(gap):.0%}: it does more "
                f"after its output layer than fastrlhf knows of; {UNPATCH[3:]}"
            )


def _refuse(actor: Any, ring_attn_group: ProcessGroup | None, images: bool) -> None:
    if getattr(actor, "is_vlm", False) or images:
        raise RuntimeError(f"fastrlhf's forward has no vision-language actors; {UNPATCH[3:]}")
    if ring_attn_group is not None and get_world_size(ring_attn_group) > 1:
        raise RuntimeError(
            "fastrlhf's forward takes whole sequences, and ring attention splits them over "
            f"{get_world_size(ring_attn_group)} processes: use ring_attn_size=1, {UNPATCH}"
        )


def _run(actor: Any, sequences: Tensor, attention_mask: Tensor | None, position_ids: Tensor):
    """The model's output and what its head was to get, the head checked the first time."""
    head = _Head.of(actor.model)
    inner = getattr(actor.model, "module", actor.model)
    with head_input(inner.get_output_embeddings()) as seen:
        output = actor.model(sequences, attention_mask=attention_mask, position_ids=position_ids)
    if len(seen) != 1:
        raise RuntimeError(
            f"the output layer was called {len(seen)} times through its module, expected once; a "
            f"compiled engine goes around it: leave compilation off, {UNPATCH}"
        )
    if not getattr(actor, "_fastrlhf_head_checked", False):
        head.check(seen[0][:1, :1], output["logits"])
        actor._fastrlhf_head_checked = True
    output["logits"] = None
    return head, seen[0], output


def actor_forward(
    self: Any,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: ProcessGroup | None = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **mm_inputs: Any,
) -> Any:
    """`Actor.forward` of OpenRLHF 0.11: log-probabilities of actions, tempered by the actor.

    sequences, attention_mask: [B, T]; action_mask: [B, A] for the last A tokens. Returns [B, A]
    log-probabilities, or [B, T−1] of all tokens for return_logprobs without an action mask, in
    float32, differentiable. With return_output also the model's output, with return_entropy its
    `entropy` [B, T−1]. Raises RuntimeError for what the module refuses.
    """
    if action_mask is None and not return_logprobs:
        return _PATCH.original("forward")(
            self, sequences, action_mask, attention_mask, return_output, allgather_logits,
            return_logprobs, ring_attn_group, packed_seq_lens, return_entropy, **mm_inputs,
        )  # fmt: skip
    if return_entropy and not return_output:
        raise ValueError("return_entropy needs return_output=True: the output carries the entropy")
    if attention_mask is None:
        raise ValueError("Actor.forward needs an attention_mask [B, T]")
    _refuse(self, ring_attn_group, bool(mm_inputs))
    batch, length = sequences.shape
    wanted = attention_mask.bool().clone()
    if action_mask is not None:
        first = length - 1 - action_mask.shape[1]
        wanted[:, :first] = False
        wanted[:, first:-1] = action_mask.bool()
    wanted[:, -1] = False
    if self.packing_samples:
        actor_module = import_module("openrlhf.models.actor")
        inputs, positions, targets, padding, indices = actor_module.unpad_and_slice_tensor(
            sequences, attention_mask, None
        )
        wanted = wanted.reshape(-1)[indices][None]
        model_mask = None
    else:
        inputs, targets, model_mask = sequences, sequences.roll(-1, 1), attention_mask
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    head, hidden, output = _run(self, inputs, model_mask, positions)
    found = head.tokens(hidden, targets.masked_fill(~wanted, -100), self.temperature)

    def padded(x: Tensor) -> Tensor:
        if self.packing_samples:
            x = actor_module.gather_and_pad_tensor(x, None, padding, indices, batch, length)
        return x[:, :-1]

    if return_entropy:
        output.entropy = padded(found.entropy)
    logprobs = padded(found.logprobs)
    if action_mask is not None:
        logprobs = logprobs[:, -action_mask.shape[1] :] * action_mask.float()
    return (logprobs, output) if return_output else logprobs


def _replacements() -> list[Replacement]:
    OPENRLHF.require()
    actor = import_module("openrlhf.models.actor").Actor
    OPENRLHF.expect("openrlhf.models.actor.Actor.forward", actor.forward, SIGNATURE)
    return [Replacement(lambda: [actor], "forward", actor.forward, actor_forward)]


_PATCH = Patch(_replacements)


def patch() -> Applied:
    """Put our head into OpenRLHF's Actor until `unpatch()`, or for the length of `with patch():`.

    Patching twice changes nothing. Actors that exist already are patched too. Raises ImportError
    for an OpenRLHF that is missing or not 0.11.x.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Put OpenRLHF's own forward back; without `patch()`, change nothing."""
    _PATCH.undo()
