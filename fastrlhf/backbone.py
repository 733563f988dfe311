"""One backbone, many roles: policy, reference, critic, reward and further policies share weights.

`roles.py` says which weights each role has and what trains; here they compute. The layers below the
lowest trained one, the trunk, run once for all roles. Where everything trains there are none: the
trunk is the tokens themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import LoraSettings
from .errors import UserError
from .heads import last_states
from .pretrained import Pretrained, find_pretrained
from .quantization import Quantization, is_quantized, layer_weights
from .roles import Role, Roles, RoleSettings
from .trunk import Decoder, WholeDecoder, split_decoder

__all__ = ["LoraSettings", "Role", "SharedBackbone"]

RANK_16 = LoraSettings()


class SharedBackbone(Roles):
    """A language model that plays every role.

    Args:
        model: a transformers causal language model; it is changed in place.
        lora: the adapters' size; None trains the layers' own weights.
        train_layers: how many top layers train, or "all".
        critic: "shared", "adapter", or None for algorithms without values.
        reward: whether there is a reward role.
        reference: whether there is a reference. Without one, full training keeps no originals.
        reference_model: the second model where everything trains; None: a copy of ``model``.
        adapter: a folder in PEFT's format: the LoRA adapter from which policy and reference start.
        gradient_checkpointing: recompute the trained layers' activations in the backward.
        tokenizer: the model's, kept beside it for whoever trains.

    Raises:
        UserError: more trained layers than the model has, roles that exclude each other, or an
            adapter that fits another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lora: LoraSettings | None = RANK_16,
        train_layers: int | Literal["all"] = "all",
        critic: Literal["shared", "adapter"] | None = "shared",
        reward: bool = False,
        reference: bool = True,
        reference_model: PreTrainedModel | None = None,
        adapter: str | Path | None = None,
        gradient_checkpointing: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        settings = RoleSettings(
            lora=lora, train_layers=train_layers, critic=critic, reward=reward,
            reference=reference, reference_model=reference_model, adapter=adapter,
        )  # fmt: skip
        super().__init__(model, settings)
        self.tokenizer = tokenizer
        depth = self.decoder.config.num_hidden_layers
        self.halves: Decoder = self.make_halves(depth - self.top, gradient_checkpointing)
        self.eval()

    def make_halves(self, split: int, gradient_checkpointing: bool) -> Decoder:
        if self.entire:
            # The embedding trains, so no part of the forward is common to roles and epochs.
            return WholeDecoder(self.decoder, gradient_checkpointing=gradient_checkpointing)
        halves = split_decoder(
            self.decoder,
            split,
            gradient_checkpointing=gradient_checkpointing,
            layer_weights=layer_weights,
        )
        if isinstance(halves, WholeDecoder):
            warnings.warn(
                f"{self.model.config.model_type} models run whole: no trunk is cached, so each "
                "role and epoch pays for all layers",
                stacklevel=4,
            )
        return halves

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
        """Load a model with its tokenizer; ``settings`` are those of `load`."""
        found = find_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        return cls.load(found, dtype=dtype, device=device, tokenizer=found.tokenizer, **settings)

    @classmethod
    def load(
        cls,
        found: Pretrained,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        quantization: Quantization | None = None,
        reference_quantization: Quantization | None = None,
        **settings: Any,
    ) -> SharedBackbone:
        """Load a model that was found.

        Args:
            quantization: of the base weights, on which only adapters train.
            reference_quantization: of the second model where everything trains.
            settings: those of the constructor.
        """
        asked = {**(cls.__init__.__kwdefaults__ or {}), **settings}
        # Before weights are read, which can take minutes.
        roles = RoleSettings(**{field.name: asked[field.name] for field in fields(RoleSettings)})
        depth = found.config.get_text_config().num_hidden_layers
        roles.check(depth, quantized=quantization is not None)
        loads_second = roles.entire and roles.reference and roles.reference_model is None
        if reference_quantization is not None and not loads_second:
            raise UserError(
                "reference_quantization is for the second model that lora=None with "
                "train_layers='all' loads for its reference; leave it out"
            )
        model = found.load(dtype=dtype, device=device, quantization=quantization)
        if reference_quantization is not None:
            settings["reference_model"] = found.load(
                dtype=dtype, device=device, quantization=reference_quantization
            )
        return cls(model, **settings).to(device)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

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
        return self.halves.top(trunk, attention_mask, partial(self.role, role), position_ids)

    def hidden_together(
        self,
        roles: Sequence[Role],
        trunk: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> dict[Role, Tensor]:
        """`hidden` of several roles without gradients, to the same bits.

        Quantised layers are run for all roles in turn, so that a weight is dequantised once. Others
        are not: changing the role costs more than a layer that is there already.
        """
        if not is_quantized(self.model):
            with torch.no_grad():
                return {
                    role: self.hidden(role, trunk, attention_mask, position_ids) for role in roles
                }
        contexts = [partial(self.role, role) for role in roles]
        states = self.halves.top_together(trunk, attention_mask, contexts, position_ids)
        return dict(zip(roles, states, strict=True))

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
        if self.value_head is None:
            raise UserError("this backbone has no critic; make it with critic='shared'")
        if self.critic == "adapter":
            own = self.hidden("critic", trunk, attention_mask, position_ids)
            return self.value_head(own)
        return self.value_head(policy_hidden)

    def reward_scores(
        self, tokens: Tensor, attention_mask: Tensor, trunk: Tensor | None = None
    ) -> Tensor:
        """The reward of every sequence, [B] float32, read at its last real token.

        Args:
            tokens, attention_mask: [B, L], padded on either side.
            trunk: their trunk, where it is known already.
        """
        if self.reward_head is None:
            raise UserError("this backbone has no reward role; make it with reward=True")
        if trunk is None:
            trunk = self.trunk(tokens, attention_mask)
        hidden = self.hidden("reward", trunk, attention_mask)
        return self.reward_head(last_states(hidden, attention_mask))
