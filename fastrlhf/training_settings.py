"""What trains, and in which memory: settings of that kind which contradict each other are refused.

No torch is imported here: a typo on the command line is told before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .algorithm_settings import require

if TYPE_CHECKING:
    from .config import PPOConfig

__all__ = ["check_training"]


def check_training(config: PPOConfig) -> None:
    """Raise UserError for settings of weights, optimizer, cache or microbatches that cannot be."""
    check_what_trains(config)
    require(
        config.optim != "adamw_torch" or config.use_peft or not config.bf16,
        "adamw_torch would train bfloat16 weights with states in bfloat16, which loses small "
        "steps; set optim to adamw_8bit",
    )
    require(
        config.trunk_cache_mb is None or config.trunk_cache_mb >= 0,
        "trunk_cache_mb must not be negative",
    )
    require(
        config.trunk_cache or config.trunk_cache_mb is None,
        "trunk_cache_mb needs trunk_cache: true; leave it out to keep nothing",
    )
    check_one_microbatch(config)


def check_what_trains(config: PPOConfig) -> None:
    require(
        config.use_peft or config.quantization is None,
        "only adapters train on quantised weights; set use_peft: true or quantization: null",
    )
    require(
        config.use_peft or config.adapter is None,
        "an adapter to start from needs LoRA; set use_peft: true or adapter: null",
    )
    # Only where everything trains is the reference a whole model of its own.
    second = not config.use_peft and config.train_layers == "all"
    require(
        config.reference_quantization is None or (second and config.kl_coef > 0),
        "reference_quantization is for the copy that use_peft: false, train_layers: all and a "
        "kl_coef above 0 need; set it to null",
    )
    require(
        config.critic != "adapter" or not second or config.kl_coef > 0,
        "critic: adapter needs the frozen originals, which training all weights at kl_coef 0 "
        "does not keep; set critic: shared",
    )
    require(
        config.kl_limit is None or config.use_peft or config.kl_coef > 0,
        "kl_limit needs a reference, which use_peft: false at kl_coef 0 does not keep; set "
        "kl_coef above 0 or leave kl_limit out",
    )


def check_one_microbatch(config: PPOConfig) -> None:
    """Refuse an optimizer_in_backward that even the shortest sequences would not allow."""
    sequences = config.batch_size // config.num_mini_batches
    # A prompt has a token at least; a response that may stop early has one too.
    shortest = 1 + (config.response_length if config.stop_token is None else 1)
    require(
        not config.optimizer_in_backward
        or sequences == 1
        or sequences * shortest <= config.microbatch_tokens,
        f"optimizer_in_backward needs a minibatch in one microbatch, and {sequences} sequences of "
        f"{shortest} tokens or more do not fit in microbatch_tokens ({config.microbatch_tokens}); "
        "raise microbatch_tokens or num_mini_batches",
    )
