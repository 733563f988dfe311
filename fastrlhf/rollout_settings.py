"""Who samples, and how: the settings of rollouts that `PPOConfig` inherits.

No torch is imported here: a typo on the command line is told before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .algorithm_settings import require

if TYPE_CHECKING:
    from .config import PPOConfig

__all__ = ["RolloutSettings", "check_rollout"]


@dataclass(frozen=True)
class RolloutSettings:
    """Settings of the engine that samples."""

    engine: Literal["fastrlhf", "transformers", "vllm"] = "fastrlhf"
    """Who samples. `fastrlhf`: the own decode loop; `transformers`: its continuous batching;
    `vllm`: vLLM, of `pip install 'fastrlhf[vllm]'`. Others' log-probabilities differ from the
    policy's."""
    rollout_slots: int | None = None
    """Sequences sampled at a time; the next begins where one ends. None: all of a rollout."""
    cuda_graphs: bool = False
    """Whether the own loop's steps are replayed as CUDA graphs, on a GPU and of layers that are not
    quantised. Off: not measured on a GPU yet."""
    importance_cap: float = 2.0
    """Where another engine samples, each token's advantage is multiplied by min(pi_old / pi_engine,
    this), as in truncated importance sampling (docs/math.md, section 3.6)."""
    vllm_gpu_memory_utilization: float = 0.3
    """The share of the GPU's memory that vLLM takes, its copy of the weights included. The rest is
    for the policy and its update."""
    vllm_max_model_length: int | None = None
    """Tokens of the longest prompt and response together that vLLM keeps room for; None: the
    model's context, which may be more than its share of the memory holds."""


def check_rollout(config: PPOConfig) -> None:
    """Raise UserError for values that cannot be."""
    slots = config.rollout_slots
    require(slots is None or slots >= 1, "rollout_slots must be at least 1, or null")
    require(config.importance_cap > 0, "importance_cap must be above 0")
    own = config.engine == "fastrlhf"
    require(
        slots is None or own,
        "rollout_slots is for the own decode loop; leave it out, or set engine to fastrlhf",
    )
    require(
        0 < config.vllm_gpu_memory_utilization <= 1,
        "vllm_gpu_memory_utilization must be above 0 and at most 1",
    )
    longest = config.vllm_max_model_length
    require(
        longest is None or longest > config.response_length,
        "vllm_max_model_length must be above response_length: the prompt has its place too",
    )
