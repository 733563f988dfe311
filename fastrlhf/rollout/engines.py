"""Where rollouts come from: one interface, whoever samples."""

from __future__ import annotations

from typing import Any

from ..backbone import SharedBackbone
from ..config import PPOConfig
from .decode import DecodeEngine

__all__ = ["make_engine"]


def make_engine(backbone: SharedBackbone, tokenizer: Any, config: PPOConfig) -> DecodeEngine:
    """The engine that ``config`` asks for."""
    return DecodeEngine(
        backbone,
        tokenizer,
        response_length=config.response_length,
        temperature=config.temperature,
        stops=config.stop_token == "eos",
        trunk_cache=config.trunk_cache,
        trunk_cache_mb=config.trunk_cache_mb,
        slots=config.rollout_slots,
    )
