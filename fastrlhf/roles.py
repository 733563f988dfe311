"""Which weights a role computes with, and which of them train.

What trains decides what is the policy's own and where the reference comes from:

1. LoRA in all layers or in the top k (`lora`, `train_layers`): the policy is an adapter, the
   reference the base with adapters off (or with a frozen copy of the adapter that training started
   from), and every further policy an adapter.
2. Full training of the top k layers (`lora=None`): the policy owns those layers, the final norm and
   an untied head; frozen originals of them are the reference. A tied embedding and head are frozen.
3. Full training of everything (`lora=None, train_layers="all"`): a second model, which may be
   quantised, is the reference.

The critic is a value head on the policy's hidden states (`shared`) or on those of an adapter of its
own (`adapter`), the reward an adapter and a head; in full training both adapters are on the frozen
originals. Whatever does not train is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers import PreTrainedModel

from .adapters import Adapters, LoraSettings, carries_adapters
from .errors import UserError, nearest
from .heads import LanguageModelHead, RewardHead, ValueHead
from .originals import Adapted, OwnModel, OwnTop
from .quantization import compute_dequantized, is_quantized

if TYPE_CHECKING:
    from peft import LoraConfig

    from .adapter_file import AdapterFile

__all__ = ["Role", "RoleSettings", "Roles"]

Role = str
# PEFT writes the adapter named "default" where other tools look for it.
POLICY_ADAPTER = "default"
RESERVED = ("policy", "reference", "critic", "reward", POLICY_ADAPTER)


@dataclass(frozen=True)
class RoleSettings:
    """Which roles there are and what trains: see `SharedBackbone`, which has the defaults."""

    lora: LoraSettings | None
    train_layers: int | Literal["all"]
    critic: Literal["shared", "adapter"] | None
    reward: bool
    reference: bool
    reference_model: PreTrainedModel | None
    adapter: str | Path | None

    @property
    def entire(self) -> bool:
        """Whether everything trains."""
        return self.lora is None and self.train_layers == "all"

    @property
    def on_originals(self) -> list[Role]:
        """The roles that are adapters of their own, in full training on the frozen originals."""
        asked = (("critic", self.critic == "adapter"), ("reward", self.reward))
        return [role for role, on in asked if on]

    def check(self, depth: int, *, quantized: bool) -> None:
        """Whether there can be such roles on a model of ``depth`` layers.

        Raises:
            UserError: they exclude each other, or the model's depth excludes one.
        """
        train_layers = self.train_layers
        is_count = isinstance(train_layers, int) and not isinstance(train_layers, bool)
        if train_layers != "all" and not (is_count and train_layers >= 1):
            raise UserError(f"train_layers is {train_layers!r}; set it to 'all' or at least 1")
        if train_layers != "all" and train_layers > depth:
            raise UserError(
                f"train_layers is {train_layers}, but the model has {depth} layers; lower it"
            )
        if self.critic not in ("shared", "adapter", None):
            raise UserError(f"critic is {self.critic!r}; set it to 'shared', 'adapter' or None")
        if self.reference_model is not None and not (self.entire and self.reference):
            raise UserError(
                "reference_model is for the reference that lora=None with train_layers='all' "
                "needs; leave it out"
            )
        if self.lora is not None:
            return
        if quantized:
            raise UserError(
                "a quantised model's own weights cannot be trained; train adapters (use_peft: "
                "true), or load the model with quantization: null"
            )
        if self.adapter is not None:
            raise UserError("an adapter to start from needs LoRA; set use_peft: true")
        if self.entire and self.on_originals and not self.reference:
            raise UserError(
                f"the {self.on_originals[0]} adapter needs the frozen originals, which are not "
                "kept without a reference; set kl_coef above 0 or critic='shared', without reward"
            )


def check_models(model: PreTrainedModel, reference_model: PreTrainedModel | None) -> None:
    """Refuse models with adapters, and a reference whose states or tokens are not the model's."""
    for given in (model, reference_model):
        if given is not None and carries_adapters(given):
            raise UserError(
                "this model has adapters of PEFT already, so the reference would not be its base; "
                "load the model anew, or pass the adapter's folder as adapter="
            )
    if reference_model is None:
        return
    ours, theirs = (tuple(m.get_output_embeddings().weight.shape) for m in (model, reference_model))
    if ours != theirs:
        raise UserError(
            f"reference_model has {theirs[0]} tokens and hidden size {theirs[1]}, the model "
            f"{ours[0]} and {ours[1]}; give one of the same family and size"
        )


class Roles(nn.Module):
    """The weights of every role on one set of base weights. Arguments: see `SharedBackbone`."""

    def __init__(self, model: PreTrainedModel, settings: RoleSettings):
        super().__init__()
        config = model.config.get_text_config()
        depth = config.num_hidden_layers
        settings.check(depth, quantized=is_quantized(model))
        lora, critic, reward = settings.lora, settings.critic, settings.reward
        reference, adapter = settings.reference, settings.adapter
        reference_model, on_originals = settings.reference_model, settings.on_originals
        check_models(model, reference_model)
        self.lora, self.critic, self.has_reference = lora, critic, reference
        # Until a step is taken; a second model, given or quantised, is another from the beginning.
        self.starts_as_reference = reference_model is None
        self.top = depth if settings.train_layers == "all" else settings.train_layers
        self.entire = settings.entire
        for given in (model, reference_model):
            if given is not None:
                compute_dequantized(given)
        keep = reference or bool(on_originals)
        if lora is not None:
            self.base: Adapted = Adapted(model)
        elif self.entire:
            self.base = OwnModel(model, reference_model, keep=keep)
        else:
            self.base = OwnTop(model, self.top, keep=keep, reference=reference)
        self.adapters = Adapters(self.base.adapted)
        # The adapters with which each role computes.
        self.roles: dict[Role, tuple[str, ...]] = {"policy": ()}
        if reference:
            self.roles["reference"] = ()
        if adapter is not None:
            from .adapter_file import AdapterFile

            self.start_from(AdapterFile.read(adapter, model, depth - self.top))
        elif lora is not None:
            self.add_adapter("policy", POLICY_ADAPTER)
        for role in on_originals:
            self.add_adapter(role, role)
        self.value_head = ValueHead(config.hidden_size) if critic else None
        self.reward_head = RewardHead(config.hidden_size) if reward else None
        # By name, kept in checkpoints; whoever adds one trains it.
        self.further_heads: dict[str, nn.Module] = {}
        self.base.begin()
        self.train_roles("policy", *(["critic"] if critic else []))

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

    @property
    def adapter_config(self) -> LoraConfig:
        """Of a new adapter."""
        depth = self.model.config.get_text_config().num_hidden_layers
        layers = list(range(depth - self.top, depth))
        return (self.lora or LoraSettings()).for_layers(self.base.adapted, layers)

    def add_adapter(self, role: Role, name: str) -> None:
        self.adapters.add(name, self.adapter_config)
        self.roles[role] = (name,)

    def start_from(self, file: AdapterFile) -> None:
        """Let the policy be a given adapter, and the reference the base with a copy of it."""
        self.adapters.load(POLICY_ADAPTER, file)
        self.roles["policy"] = (POLICY_ADAPTER,)
        if self.has_reference:
            self.adapters.copy(POLICY_ADAPTER, "reference")
            self.roles["reference"] = ("reference",)

    def add_policy(self, name: str) -> None:
        """A further policy, with an adapter of its own that trains; it starts as the reference.

        Raises:
            UserError: a name that is taken or that no folder can have, or a backbone without LoRA.
        """
        if self.lora is None:
            raise UserError(
                f"policy {name!r} needs an adapter, and full training has none; set use_peft: true"
            )
        taken = dict.fromkeys((*RESERVED, *self.roles))
        # PEFT keeps adapters in a ModuleDict, which holds nothing under its own methods' names.
        held = not hasattr(nn.ModuleDict(), name)
        if name in taken or not held or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"a policy cannot be named {name!r}; use letters, digits, - and _, and none of "
                f"{', '.join(taken)} or the methods of a dictionary"
            )
        if start := self.roles.get("reference"):
            self.adapters.copy(start[0], name)
        else:
            self.adapters.add(name, self.adapter_config)
        self.roles[name] = (name,)
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

        Raises:
            UserError: a role that this backbone does not have, or that has nothing to train.
        """
        trainable = [r for r in dict.fromkeys((*self.roles, "critic")) if r != "reference"]
        trainable = [role for role in trainable if self.role_parameters(role)]
        for role in roles:
            if role not in trainable:
                raise UserError(
                    f"{role!r} is no role that this backbone can train; {nearest(role, trainable)}"
                )
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

    @contextmanager
    def policy_is(self, role: Role) -> Iterator[None]:
        """Within the block whatever is done as the policy is done with another role's weights.

        Raises:
            UserError: a role that this backbone does not have.
        """
        before, self.roles["policy"] = self.roles["policy"], self.adapters_of(role)
        try:
            yield
        finally:
            self.roles["policy"] = before

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
