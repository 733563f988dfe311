"""A tiny random model of every family that can be split, with every parameter off its default.

Windows are shorter than the test's sequences, and the kinds of the upper layers are not those of
the lower ones, so a layer that is given the mask of another index is seen.
"""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

SIZES = dict(
    vocab_size=28,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)
GPT2 = dict(
    vocab_size=28,
    n_embd=32,
    n_layer=4,
    n_head=4,
    n_positions=64,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=0,
)
ALTERNATING = [
    "sliding_attention",
    "full_attention",
    "full_attention",
    "sliding_attention",
]
WINDOWS = dict(
    use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=ALTERNATING
)
GEMMA = dict(query_pre_attn_scalar=8, layer_types=ALTERNATING, sliding_window=4)
LONG = dict(
    original_max_position_embeddings=32,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
    },
)

# name -> (model type, what differs from SIZES)
FAMILIES = {
    "llama": ("llama", dict(attention_bias=True)),
    "mistral": ("mistral", dict(sliding_window=4)),
    "mistral without window": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", WINDOWS),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2)),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | dict(
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            }
        ),
    ),
    "phi3": ("phi3", dict(sliding_window=4, partial_rotary_factor=0.5)),
    "phi3 with long rope": (
        "phi3",
        LONG,
    ),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", dict(rotary_pct=0.5, use_parallel_residual=True)),
    "gpt_neox in series": ("gpt_neox", dict(rotary_pct=0.5, use_parallel_residual=False)),
}


def model(name: str, seed: int = 0) -> PreTrainedModel:
    """The model ``name`` of FAMILIES, in float32."""
    model_type, changes = FAMILIES[name]
    sizes = GPT2 if model_type == "gpt2" else SIZES
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **sizes | changes)
    made = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        # Norms and biases start at constants, which would hide that one is left out.
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def unknown(**changes) -> PreTrainedModel:
    """A model of a family that is not in the table: it runs whole."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=28,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return OPTForCausalLM(OPTConfig(**sizes | changes)).eval()
