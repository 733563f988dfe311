"""What a run's settings ask for, found and checked: its model, tokenizer and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from .adapters import LoraSettings
from .backbone import SharedBackbone
from .config import PPOConfig
from .data import PromptSet
from .errors import UserError
from .host_memory import map_large_blocks, spares_memory
from .pretrained import Pretrained, checked_tokenizer, context_length, find_pretrained
from .quantization import Quantization

__all__ = ["Source", "find_model", "load_backbone", "tokenized_prompts"]


class Source(Protocol):
    """Whatever a model can be loaded from, as `pretrained.Pretrained` is one."""

    def load(
        self,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        quantization: Quantization | None = None,
    ) -> PreTrainedModel: ...


def load_backbone(source: Source, config: PPOConfig, device: str) -> SharedBackbone:
    """Load ``source`` as ``config`` says and add what trains."""
    found: Any = source
    if device == "cpu" and spares_memory(config):
        # Before the weights come: reading them for a quantised model is its largest phase.
        map_large_blocks()
    return SharedBackbone.load(
        found,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        device=device,
        quantization=config.quantization,
        reference_quantization=config.reference_quantization,
        lora=LoraSettings(config.lora_rank, config.lora_alpha) if config.use_peft else None,
        train_layers=config.train_layers,
        critic=config.critic,
        adapter=config.adapter,
        # Adapters give the reference for nothing; full training pays for it with a copy.
        reference=config.kl_coef > 0 or (config.use_peft and config.old_logprobs == "scored"),
        gradient_checkpointing=config.gradient_checkpointing,
    )


def find_model(
    model: str | SharedBackbone, tokenizer: Any, config: PPOConfig
) -> tuple[SharedBackbone | Pretrained, Any]:
    """The backbone, or where to load it from, and the tokenizer; no weights are loaded yet.

    Raises:
        UserError: a model that cannot be found, or a backbone that lacks what ``config`` needs.
    """
    if not isinstance(model, SharedBackbone):
        source = find_pretrained(model, trust_remote_code=config.trust_remote_code)
        return source, tokenizer if tokenizer is not None else source.tokenizer
    tokenizer = tokenizer if tokenizer is not None else model.tokenizer
    if tokenizer is None:
        raise UserError("a backbone needs its tokenizer; pass processing_class")
    if config.critic and model.critic is None:
        raise UserError(f"{config.algorithm} needs a backbone with a critic: 'shared'")
    if (config.kl_coef or config.kl_limit) and not model.has_reference:
        raise UserError("no reference, no KL; set kl_coef to 0 and leave kl_limit out")
    checked_tokenizer(tokenizer, "processing_class")
    return model, tokenizer


def tokenized_prompts(
    source: SharedBackbone | Pretrained,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]] | None,
    config: PPOConfig,
) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts; no text is in both."""
    own = source.decoder.config if isinstance(source, SharedBackbone) else source.config
    limits = {"context": context_length(own), "response_length": config.response_length}
    train = PromptSet.tokenize(rows, tokenizer, **limits)
    if eval_rows is None:
        return train.split(config.eval_prompts, config.seed)
    held_out = PromptSet.tokenize(eval_rows, tokenizer, **limits)
    train = train.without(held_out)
    if not len(train):
        raise UserError("every training prompt is in eval_dataset too; give others")
    return train, held_out
