"""One backbone, many roles: policy, reference and critic are one set of base weights.

The policy is the base with a LoRA adapter in its top layers; the reference is the base with
adapters off; the critic is a value head on the policy's hidden states (`shared`) or on those of an
adapter of its own (`adapter`). The embedding, the layers below, the norm and the head are frozen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .errors import UserError
from .heads import LanguageModelHead, ValueHead
from .pretrained import find_pretrained
from .trunk import Decoder, WholeDecoder, split_decoder

__all__ = ["LoraSettings", "Role", "SharedBackbone"]

Role = Literal["policy", "reference", "critic"]
# PEFT writes the adapter named "default" where other tools look for it.
ADAPTERS: dict[Role, list[str]] = {"policy": ["default"], "reference": [], "critic": ["critic"]}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al. 2021) on every linear layer of the trained blocks."""

    rank: int = 16
    alpha: float = 32.0

    def for_layers(self, decoder: nn.Module, layers: list[int]) -> LoraConfig:
        """PEFT's configuration for an adapter in ``layers``; no dropout (docs/math.md, 5.12)."""
        linear = {name.rpartition(".")[2] for name, m in decoder.named_modules() if is_linear(m)}
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=sorted(linear),
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in decoder.modules()),
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        )


class SharedBackbone(nn.Module):
    """A language model that plays every role.

    Args:
        model: a transformers causal language model; its weights are frozen, adapters are added.
        lora: the adapters' size.
        train_layers: how many top layers carry adapters, or "all".
        critic: "shared", "adapter", or None for algorithms without values.
        gradient_checkpointing: recompute the trained layers' activations in the backward.
        tokenizer: the model's, kept beside it for whoever trains.

    Raises:
        UserError: more trained layers than the model has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lora: LoraSettings = LoraSettings(),
        train_layers: int | Literal["all"] = "all",
        critic: Literal["shared", "adapter"] | None = "shared",
        gradient_checkpointing: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        config = model.config
        depth = config.get_text_config().num_hidden_layers
        top = depth if train_layers == "all" else train_layers
        if top > depth:
            raise UserError(f"train_layers is {top}, but the model has {depth} layers; lower it")
        self.decoder = model.get_decoder()
        trained = lora.for_layers(self.decoder, list(range(depth - top, depth)))
        self.peft: PeftModel = get_peft_model(model, trained)
        if critic == "adapter":
            self.peft.add_adapter("critic", trained)
        self.critic = critic
        self.has_reference = True
        self.value_head = ValueHead(config.hidden_size) if critic else None
        self.head = LanguageModelHead.of(model)
        self.halves: Decoder = split_decoder(
            self.decoder, depth - top, gradient_checkpointing=gradient_checkpointing
        )
        if isinstance(self.halves, WholeDecoder):
            warnings.warn(
                f"{config.model_type} models run whole: no trunk is cached, so each role and "
                "epoch pays for all layers",
                stacklevel=3,
            )
        self.adapted = [m for m in self.peft.modules() if isinstance(m, LoraLayer)]
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> SharedBackbone:
        """Load a model with its tokenizer; ``settings`` are those of the constructor."""
        found = find_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        model = found.load(dtype=dtype, device=device)
        return cls(model, tokenizer=found.tokenizer, **settings).to(device)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer steps: adapters and the value head."""
        return [p for p in self.parameters() if p.requires_grad]

    @contextmanager
    def role(self, role: Role) -> Iterator[nn.Module]:
        """Within the block the decoder computes as ``role``; yields it.

        The adapters are picked on the layers themselves: PEFT's own switch also changes which
        parameters require a gradient, and with it what the optimizer sees.
        """
        before = [(m._active_adapter, m._disable_adapters) for m in self.adapted]
        names = ADAPTERS[role]
        for module in self.adapted:
            module._active_adapter, module._disable_adapters = names, not names
        try:
            yield self.decoder
        finally:
            for module, (active, disabled) in zip(self.adapted, before, strict=True):
                module._active_adapter, module._disable_adapters = active, disabled

    @property
    def reference_head(self) -> LanguageModelHead:
        """The reference's output layer: the policy's, unless that trains."""
        return self.head

    def trunk(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The frozen lower layers, once for all roles: [B, L] -> [B, L, D]."""
        return self.halves.trunk(tokens, attention_mask, position_ids)

    def hidden(
        self,
        role: Role,
        trunk: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states of a role: the trunk's output -> [B, L, D]."""
        with self.role(role):
            return self.halves.top(trunk, attention_mask, lambda: self.role(role), position_ids)

    @torch.no_grad()
    def hidden_together(
        self,
        roles: Sequence[Role],
        trunk: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> dict[Role, Tensor]:
        """`{role: hidden(role, ...) for role in roles}`, without gradients."""
        return {role: self.hidden(role, trunk, attention_mask, position_ids) for role in roles}

    def values(
        self,
        policy_hidden: Tensor,
        trunk: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The critic's value of every state, [B, L] float32.

        Args:
            policy_hidden: the policy's hidden states, which a shared critic reads.
            trunk, attention_mask, position_ids: what an adapter critic computes its own from.
        """
        assert self.value_head is not None, "this backbone has no critic"
        if self.critic == "adapter":
            return self.value_head(self.hidden("critic", trunk, attention_mask, position_ids))
        return self.value_head(policy_hidden)

    def save_adapters(self, folder: str | Path) -> None:
        """Write the adapters in PEFT's format: the policy's, and in `critic/` the critic's."""
        adapters = ["default", "critic"] if self.critic == "adapter" else ["default"]
        self.peft.save_pretrained(str(folder), selected_adapters=adapters)
