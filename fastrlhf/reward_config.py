"""What a reward model's training is made of: one frozen dataclass, as `PPOConfig` is.

Names are those of TRL's RewardConfig where it has the setting.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import ClassVar, Literal

import yaml

from .algorithm_settings import require
from .config import checked

__all__ = ["RewardConfig"]


@dataclass(frozen=True)
class RewardConfig:
    """Settings of the training of a reward model."""

    model: str = "smollm2-135m"
    """The base: `smollm2-135m` (packaged weights), a hub name, or the path of a folder."""
    dataset: str = "movie-pairs"
    """`movie-pairs` (fetched: human ratings of movie-review snippets), or the path of a file
    (JSON Lines, a JSON array or Parquet) with chosen and rejected, or completion and rating."""
    output_dir: str | None = None
    """The run's folder; it must not hold a run. None: `runs/reward`, numbered if taken."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Off unless asked for."""

    num_train_epochs: int = 3
    """Passes over the data, at most."""
    batch_size: int = 32
    """Pairs an optimizer step; of ratings, twice as many texts and all pairs among them."""
    microbatch_tokens: int = 2048
    """Tokens in one forward and backward, padding counted; at least one text."""
    max_length: int = 512
    """Rows with a text of more tokens are left out."""

    rating_gap: float = 0.0
    """Ratings that differ by more than this make a pair to train on."""
    eval_rating_gap: float = 0.5
    """The same for held-out pairs."""
    rating_margin: float = 0.0
    """Of a pair of ratings: the margin by which the better text should win, for each point of
    difference. Pairs that are given have theirs in the column `margin`."""
    center_rewards_coefficient: float = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores about 0. TRL: None is 0."""

    learning_rate: float = 2e-4
    """Peak learning rate. TRL: 1e-4 (of LoRA)."""
    head_learning_rate: float = 2e-4
    """Peak learning rate of the reward head."""
    head_start: bool = True
    """Fit the head alone first, on the states of the untrained layers."""
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    """`linear`: to zero over the run, after the warm-up."""
    warmup_steps: int = 20
    """Optimizer steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""

    train_layers: int | Literal["all"] = 8
    """How many of the top layers carry the adapter; what lies below runs once for all epochs."""
    lora_rank: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 32.0
    """The adapter is scaled by lora_alpha / lora_rank."""
    bf16: bool = False
    """Base weights and activations in bfloat16 (scores and the adapter stay in float32)."""
    quantization: Literal["int8", "nf4"] | None = None
    """Base weights in 8 or 4 bits (bitsandbytes)."""
    trunk_cache_mb: int | None = 2048
    """Megabytes of the frozen layers' output kept over the epochs; what is beyond is
    computed again. None: no limit."""
    gradient_checkpointing: bool = False
    """Recompute the trained layers' activations in the backward."""

    eval_rows: int | None = None
    """Pairs (or rated texts) held out of training; fewer where pairs that share texts stay
    together. None: a fifth. Unused with an eval_dataset."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations. None: once an epoch."""
    early_stopping_patience: int | None = 2
    """Evaluations in a row without a lower held-out loss after which training ends. None: never.
    The weights with the lowest held-out loss are kept in any case."""
    max_gap: float | None = None
    """Training ends when its accuracy exceeds the held-out accuracy by more than this."""
    normalize: bool = True
    """Shift and scale the trained reward to mean 0 and standard deviation 1 on training texts."""
    seed: int = 1
    """Seeds everything that is drawn."""

    # What TRL calls settings that have other names here.
    trl_names: ClassVar[dict[str, str]] = {
        "per_device_train_batch_size": "batch_size (pairs a step) with microbatch_tokens",
        "per_device_eval_batch_size": "microbatch_tokens",
        "gradient_accumulation_steps": "batch_size (pairs a step) with microbatch_tokens",
    }

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name in (field.name for field in dataclasses.fields(self)):
            object.__setattr__(self, name, checked(name, getattr(self, name), hints[name]))
        counts = "num_train_epochs batch_size microbatch_tokens max_length lora_rank"
        for name in counts.split():
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        positive = "learning_rate head_learning_rate lora_alpha max_grad_norm"
        for name in positive.split():
            require(getattr(self, name) > 0, f"{name} must be above 0")
        not_negative = (
            "rating_gap eval_rating_gap rating_margin center_rewards_coefficient warmup_steps "
            "adam_eps seed"
        )
        for name in not_negative.split():
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        for name in ("eval_rows", "eval_steps", "early_stopping_patience", "max_gap"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be above 0, or null")
        require(
            self.train_layers == "all" or self.train_layers >= 1,
            "train_layers must be 'all' or at least 1",
        )
        require(
            self.trunk_cache_mb is None or self.trunk_cache_mb >= 0,
            "trunk_cache_mb must not be negative",
        )

    def to_yaml(self) -> str:
        """The configuration as YAML that `load_config` reads back to an equal one."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
