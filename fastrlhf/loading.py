"""What a run's settings ask for, found and checked: its model, tokenizer and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from .adapters import LoraSettings
from .backbone import SharedBackbone
from .config import PPOConfig
from .data import PromptSet
from .errors import UserError
from .host_memory import map_large_blocks, spares_memory
from .pretrained import Pretrained, checked_tokenizer, context_length, find_pretrained
from .quantization import Quantization
from .reward_config import RewardConfig

__all__ = [
    "Source",
    "find_model",
    "load_backbone",
    "load_backbone_with_reward",
    "tokenized_prompts",
    "with_library_configs",
]

# Of PEFT's configuration: what we take, and what says nothing about the adapter's numbers.
LORA_TAKEN = {"r", "lora_alpha", "target_modules"}
LORA_SILENT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "fan_in_fan_out",
}  # fmt: skip
# Of bitsandbytes': scales are always nested, and the compute dtype is checked by itself.
BITS_TAKEN = {
    "load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
}  # fmt: skip


class Source(Protocol):
    """Whatever a model can be loaded from, as `pretrained.Pretrained` is one."""

    def load(
        self,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        quantization: Quantization | None = None,
    ) -> PreTrainedModel: ...


def with_library_configs(
    config: PPOConfig,
    model: str | SharedBackbone | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
) -> PPOConfig:
    """``config`` with what PEFT's and bitsandbytes' configurations ask for in its own fields.

    Args:
        model: None: `config.model`.
        peft_config: a `peft.LoraConfig`: r and lora_alpha; target_modules, where given, all linear
            layers of the model's blocks. `train_layers` says in which blocks.
        quantization_config: a `transformers.BitsAndBytesConfig`, "int8" or "nf4". NF4's scales are
            nested (`bnb_4bit_use_double_quant`) either way.

    Raises:
        UserError: whatever else they ask for, or settings that say otherwise.
    """
    if isinstance(model, SharedBackbone) and (peft_config or quantization_config):
        raise UserError(
            "this backbone has its adapters and its weights already; leave peft_config and "
            "quantization_config out"
        )
    if peft_config is not None:
        config = with_lora(config, model or config.model, peft_config)
    if quantization_config is not None:
        asked = quantization_asked(quantization_config, "bfloat16" if config.bf16 else "float32")
        if config.quantization not in (None, asked):
            raise UserError(
                f"quantization_config is {asked} and quantization {config.quantization}; leave "
                "one of them out"
            )
        config = replace(config, quantization=asked)
    if config.use_peft or config.critic == "adapter":
        # Before a phase's memory is measured: what is imported counts as none's.
        import_module("peft")
    return config


def with_lora(config: PPOConfig, model: Any, asked: Any) -> PPOConfig:
    from peft import LoraConfig

    if not isinstance(asked, LoraConfig):
        raise UserError(f"peft_config is a {type(asked).__name__}; give a peft.LoraConfig")
    if not config.use_peft:
        raise UserError("peft_config needs LoRA; set use_peft: true or leave peft_config out")
    if config.adapter is not None:
        raise UserError("an adapter brings its own rank and alpha; leave peft_config out")
    refuse_others("peft_config", asked.to_dict(), LoraConfig().to_dict(), LORA_TAKEN | LORA_SILENT)
    if asked.target_modules not in (None, "all-linear"):
        found = find_pretrained(model, trust_remote_code=config.trust_remote_code)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(
                found.config, trust_remote_code=config.trust_remote_code
            )
        ours = LoraSettings().for_layers(shape, [0]).target_modules
        if ours is None or set(asked.target_modules) != set(ours):
            raise UserError(
                f"adapters are on all of {', '.join(sorted(ours or ()))}, and peft_config's "
                "target_modules on others; leave target_modules out"
            )
    return replace(config, lora_rank=asked.r, lora_alpha=float(asked.lora_alpha))


def quantization_asked(asked: Any, dtype: str) -> Any:
    """ "int8" or "nf4", for a model that computes in ``dtype``."""
    if isinstance(asked, str):
        return asked
    if not isinstance(asked, BitsAndBytesConfig):
        raise UserError(
            f"quantization_config is a {type(asked).__name__}; give a "
            "transformers.BitsAndBytesConfig, 'int8' or 'nf4'"
        )
    given = asked.to_dict()
    refuse_others("quantization_config", given, BitsAndBytesConfig().to_dict(), BITS_TAKEN)
    if asked.load_in_8bit:
        return "int8"
    if not asked.load_in_4bit:
        raise UserError("quantization_config quantises nothing; set load_in_8bit or load_in_4bit")
    if asked.bnb_4bit_quant_type != "nf4":
        raise UserError(
            f"bnb_4bit_quant_type {asked.bnb_4bit_quant_type!r} is not supported; set it to 'nf4'"
        )
    # float32 is bitsandbytes' default: it need not have been asked for.
    if given["bnb_4bit_compute_dtype"] not in ("float32", dtype):
        raise UserError(
            f"bnb_4bit_compute_dtype is {given['bnb_4bit_compute_dtype']} and this run computes in "
            f"{dtype}; leave it out, or set bf16: true for bfloat16"
        )
    return "nf4"


def refuse_others(
    name: str, given: Mapping[str, Any], default: Mapping[str, Any], taken: set[str]
) -> None:
    """Raise UserError for the first field beside those ``taken`` that is not the default."""
    for field, value in given.items():
        if field not in taken and value != default.get(field):
            raise UserError(
                f"{name}: {field}={value!r} is not supported; leave {field} out"
                + (" and set train_layers" if field == "layers_to_transform" else "")
            )


def load_backbone(source: Source, config: PPOConfig, device: str) -> SharedBackbone:
    """Load ``source`` as ``config`` says and add what trains."""
    found: Any = source
    if device == "cpu":
        # Before the weights come: reading them for a quantised model is its largest phase.
        map_large_blocks(sparing=spares_memory(config))
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    refuse_tf32(device, dtype)
    return SharedBackbone.load(
        found,
        dtype=dtype,
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


def refuse_tf32(device: str, dtype: torch.dtype) -> None:
    """Raise UserError where float32 products would be rounded to 10 bits behind the run's back.

    The products of the loss then differ from scoring's by 1e-3, and no first ratio is 1.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if device.startswith("cuda") and dtype == torch.float32 and allowed:
        raise UserError(
            "this process rounds float32 products to TF32; call "
            "torch.set_float32_matmul_precision('highest'), or set bf16: true"
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


def load_backbone_with_reward(source: Pretrained, config: RewardConfig) -> SharedBackbone:
    """The model's weights with the reward role alone: an adapter and a head, drawn by the seed."""
    torch.manual_seed(config.seed)
    return SharedBackbone.load(
        source,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        device="cuda" if torch.cuda.is_available() else "cpu",
        quantization=config.quantization,
        lora=LoraSettings(config.lora_rank, config.lora_alpha),
        train_layers=config.train_layers,
        critic=None,
        reward=True,
        reference=False,
        gradient_checkpointing=config.gradient_checkpointing,
        tokenizer=source.tokenizer,
    )


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
