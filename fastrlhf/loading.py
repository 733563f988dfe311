"""The backbone that a run's settings ask for, made from wherever its weights come from."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from .adapters import LoraSettings
from .backbone import SharedBackbone
from .config import PPOConfig
from .quantization import Quantization

__all__ = ["Source", "load_backbone"]


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
    return SharedBackbone.load(
        found,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        device=device,
        quantization=config.quantization,
        reference_quantization=config.reference_quantization,
        lora=LoraSettings(config.lora_rank, config.lora_alpha) if config.use_peft else None,
        train_layers=config.train_layers,
        critic=config.critic,
        # Adapters give the reference for nothing; full training pays for it with a copy.
        reference=config.use_peft or config.kl_coef > 0,
        gradient_checkpointing=config.gradient_checkpointing,
    )
