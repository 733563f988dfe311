"""The head's logits are the model's own, whatever the family calls its scale and its cap."""

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fastrlhf.heads
from fastrlhf.errors import UserError
from fastrlhf.heads import LanguageModelHead
from fastrlhf.logit_scale import declared_scale, declared_softcap

SIZES = dict(
    vocab_size=28,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=0,
)
LATENT = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8
)
# model type -> what differs from SIZES, the expected scale and cap
FAMILIES = {
    "cohere": (dict(logit_scale=0.3), 0.3, None),
    "cohere2": (dict(logit_scale=0.3), 0.3, None),
    "falcon_h1": (dict(lm_head_multiplier=0.2), 0.2, None),
    "granite": (dict(logits_scaling=4.0), 0.25, None),
    "granitemoe": (dict(logits_scaling=4.0), 0.25, None),
    "hyperclovax": (dict(logits_scaling=4.0), 4.0, None),
    "inkling_text": (dict(logits_mup_width_multiplier=5.0), 0.2, None),
    "minicpm3": (LATENT | dict(dim_model_base=8, num_key_value_heads=4), 0.25, None),
    "gemma2": (dict(final_logit_softcapping=0.5, head_dim=8), 1.0, 0.5),
    "nanochat": (dict(final_logit_softcapping=0.5), 1.0, 0.5),
    "recurrent_gemma": (dict(logits_soft_cap=0.5, lru_width=32, head_dim=8), 1.0, 0.5),
    "mpt": (dict(logit_scale=0.3, d_model=32, n_heads=4, n_layers=2), 1.0, None),
    "phi": ({}, 1.0, None),
}
NOT_PLAIN = [kind for kind, (_, scale, cap) in FAMILIES.items() if scale != 1.0 or cap]


def model(kind: str):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | FAMILIES[kind][0])
    made = AutoModelForCausalLM.from_config(config).float().eval()
    bias = getattr(made.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return made


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_the_models_own(kind):
    made = model(kind)
    head = LanguageModelHead.of(made)
    assert (head.logit_scale, head.softcap) == FAMILIES[kind][1:]
    tokens = torch.randint(1, 27, (2, 7))
    with torch.no_grad():
        hidden = made.get_decoder()(tokens, use_cache=False)[0]
        theirs = made(tokens, use_cache=False).logits
    torch.testing.assert_close(head.logits(hidden), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_scale_or_cap_that_is_missed_is_refused(kind, dtype, monkeypatch):
    made = model(kind).to(dtype)
    LanguageModelHead.of(made)
    monkeypatch.setattr(fastrlhf.heads, "declared_scale", lambda config: 1.0)
    monkeypatch.setattr(fastrlhf.heads, "declared_softcap", lambda config: None)
    with pytest.raises(UserError, match=f"^{kind} models compute more"):
        LanguageModelHead.of(made)


def test_a_head_of_several_layers_is_refused():
    config = AutoConfig.for_model("bert", **SIZES, is_decoder=True)
    with pytest.raises(UserError, match="use another model"):
        LanguageModelHead.of(AutoModelForCausalLM.from_config(config).eval())


def test_asking_leaves_the_model_as_it_was():
    made = tiny.model()
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = made(tokens).logits
        LanguageModelHead.of(made)
        assert torch.equal(made(tokens).logits, before)
    assert "forward" not in vars(made.get_decoder())


def test_a_model_without_storage_is_taken_at_its_word():
    with torch.device("meta"):
        head = LanguageModelHead.of(tiny.model(logit_scale=0.5))
    assert head.weight.is_meta and head.logit_scale == 0.5


def test_names_of_models_whose_code_is_elsewhere():
    assert declared_scale(LlamaConfig(hidden_size=32, dim_model_base=8)) == 0.25
    assert declared_scale(LlamaConfig(output_multiplier=0.2)) == 0.2
    assert declared_softcap(LlamaConfig(output_logit_soft_cap=30.0)) == 30.0
