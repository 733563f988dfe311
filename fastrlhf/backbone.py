"""One backbone, many roles: policy, reference, critic, reward and further policies share weights.

What trains decides what is the policy's own and where the reference comes from:

1. LoRA in all layers or in the top k (`lora`, `train_layers`): the policy is an adapter, the
   reference the base with adapters off (or with a frozen copy of the adapter that training started
   from), and every further policy an adapter.
2. Full training of the top k layers (`lora=None`): the policy owns those layers, the final norm and
   an untied head; frozen originals of them are the reference. A tied embedding and head are frozen.
3. Full training of everything (`lora=None, train_layers="all"`): a second model, which may be
   quantised, is the reference; the trunk is the tokens themselves.

The critic is a value head on the policy's hidden states (`shared`) or on those of an adapter of its
own (`adapter`), the reward an adapter and a head; in full training both adapters are on the frozen
originals. Whatever does not train is frozen.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import Adapters, LoraSettings
from .errors import UserError, nearest
from .heads import LanguageModelHead, RewardHead, ValueHead, last_states
from .originals import Adapted, OwnModel, OwnTop
from .pretrained import Pretrained, find_pretrained
from .quantization import Quantization, is_quantized, layer_weights
from .trunk import Decoder, WholeDecoder, split_decoder

__all__ = ["LoraSettings", "Role", "SharedBackbone"]

Role = str
# PEFT writes the adapter named "default" where other tools look for it.
POLICY_ADAPTER = "default"
RANK_16 = LoraSettings()
RESERVED = ("policy", "reference", "critic", "reward", POLICY_ADAPTER)


class SharedBackbone(nn.Module):
    """A language model that plays every role.

    Args:
        model: a transformers causal language model; it is changed in place.
        lora: the adapters' size; None trains the layers' own weights.
        train_layers: how many top layers train, or "all".
        critic: "shared", "adapter", or None for algorithms without values.
        reward: whether there is a reward role.
        reference: whether there is a reference. Without one, full training keeps no originals.
        reference_model: the second model where everything trains; None: a copy of ``model``.
        gradient_checkpointing: recompute the trained layers' activations in the backward.
        tokenizer: the model's, kept beside it for whoever trains.

    Raises:
        UserError: more trained layers than the model has, or roles that exclude each other.
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
        gradient_checkpointing: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.lora, self.critic, self.has_reference = lora, critic, reference
        config = model.config.get_text_config()
        depth = config.num_hidden_layers
        top = depth if train_layers == "all" else train_layers
        if top > depth:
            raise UserError(f"train_layers is {top}, but the model has {depth} layers; lower it")
        on_originals = [r for r, on in (("critic", critic == "adapter"), ("reward", reward)) if on]
        self.top, self.entire = top, lora is None and train_layers == "all"
        if self.entire and on_originals and not reference:
            raise UserError(
                f"the {on_originals[0]} adapter needs the frozen originals, which are not kept "
                "without a reference; set kl_coef above 0 or critic='shared', without reward"
            )
        if lora is None and is_quantized(model):
            raise UserError(
                "a quantised model's own weights cannot be trained; train adapters (use_peft: "
                "true), or load the model with quantization: null"
            )
        keep = reference or bool(on_originals)
        if lora is not None:
            self.base: Adapted = Adapted(model)
        elif self.entire:
            self.base = OwnModel(model, reference_model, keep=keep)
        else:
            self.base = OwnTop(model, top, keep=keep)
        self.adapters = Adapters(self.base.adapted)
        self.adapter_settings = (lora or RANK_16).for_layers(
            self.base.adapted.get_decoder(), list(range(depth - top, depth))
        )
        # The adapters with which each role computes, by role.
        self.roles: dict[Role, tuple[str, ...]] = {"policy": ()}
        if lora is not None:
            self.add_adapter("policy", POLICY_ADAPTER)
        if reference:
            self.roles["reference"] = ()
        for role in on_originals:
            self.add_adapter(role, role)
        self.value_head = ValueHead(config.hidden_size) if critic else None
        self.reward_head = RewardHead(config.hidden_size) if reward else None
        self.base.begin()
        self.halves: Decoder = self.make_halves(depth - top, gradient_checkpointing)
        self.train_roles("policy", *(["critic"] if critic else []))
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
        model = found.load(dtype=dtype, device=device, quantization=quantization)
        if reference_quantization is not None:
            settings["reference_model"] = found.load(
                dtype=dtype, device=device, quantization=reference_quantization
            )
        return cls(model, **settings).to(device)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def model(self) -> PreTrainedModel:
        """The model that was given, with what was added to it."""
        return self.base.model

    @property
    def decoder(self) -> PreTrainedModel:
        """The model's decoder."""
        return self.model.get_decoder()

    @property
    def head(self) -> LanguageModelHead:
        """The policy's head; its weight requires a gradient where it trains."""
        return self.base.head

    @property
    def reference_head(self) -> LanguageModelHead:
        """The reference's head, always frozen: the policy's weights where those do not train."""
        self.adapters_of("reference")
        return self.base.reference_head

    def add_adapter(self, role: Role, name: str) -> None:
        self.adapters.add(name, self.adapter_settings)
        self.roles[role] = (name,)

    def add_policy(self, name: str) -> None:
        """A further policy, with an adapter of its own that trains; it starts as the reference.

        Raises:
            UserError: a name that is taken or that no folder can have, or a backbone without LoRA.
        """
        if self.lora is None:
            raise UserError(
                f"policy {name!r} needs an adapter, and full training has none; set use_peft: true"
            )
        if name in RESERVED or name in self.roles or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            taken = ", ".join(dict.fromkeys((*RESERVED, *self.roles)))
            raise UserError(
                f"a policy cannot be named {name!r}; use letters, digits, - and _, and none of "
                f"{taken}"
            )
        self.add_adapter(name, name)
        self.train_roles(*self.trained_roles, name)

    def role_parameters(self, role: Role) -> list[nn.Parameter]:
        """What is a role's own: the weights that train when it does."""
        own: list[nn.Parameter] = []
        for name in self.roles.get(role, ()):
            own += self.adapters.parameters(name)
        if role == "policy":
            own += self.base.own()
        for head, user in ((self.value_head, "critic"), (self.reward_head, "reward")):
            if head is not None and role == user:
                own += head.parameters()
        return own

    def train_roles(self, *roles: Role) -> None:
        """Let the weights of these roles, and no others, take gradients.

        A new backbone trains its policy and its critic; `add_policy` adds the policy it makes.
        """
        self.trained_roles = roles
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for role in roles:
            for parameter in self.role_parameters(role):
                parameter.requires_grad_(True)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer steps."""
        return [p for p in self.parameters() if p.requires_grad]

    @contextmanager
    def role(self, role: Role) -> Iterator[PreTrainedModel]:
        """Within the block the decoder that it yields computes as ``role``.

        Raises:
            UserError: a role that this backbone does not have.
        """
        names = self.adapters_of(role)
        originals = role != "policy"
        with self.adapters.active(names), self.base.placed(originals=originals) as decoder:
            yield decoder

    def adapters_of(self, role: Role) -> tuple[str, ...]:
        """The names of the adapters with which a role computes."""
        if role in self.roles:
            return self.roles[role]
        if role == "reference":
            raise UserError(
                "this backbone was made without a reference; set kl_coef above 0, or pass "
                "reference=True"
            )
        raise UserError(f"this backbone has no role {role!r}; {nearest(role, self.roles)}")

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
        """`hidden` of several roles without gradients, each layer for all of them in turn.

        The same bits as `hidden`; a quantised weight is dequantised once.
        """
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
        assert self.value_head is not None, "this backbone has no critic"
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
        assert self.reward_head is not None, "this backbone has no reward role"
        if trunk is None:
            trunk = self.trunk(tokens, attention_mask)
        hidden = self.hidden("reward", trunk, attention_mask)
        return self.reward_head(last_states(hidden, attention_mask))
