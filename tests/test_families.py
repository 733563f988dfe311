"""Split anywhere, packed, trained or sampled from, a family computes what transformers does."""

import pytest
import tiny
import tiny_families
import torch
from tiny_families import FAMILIES
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.data import PromptSet
from fastrlhf.errors import UserError
from fastrlhf.families import family_of
from fastrlhf.rollout.decode import DecodeEngine
from fastrlhf.trunk import SplitDecoder, positions, split_decoder

LENGTH = 11  # nearly three windows


def split(family: str, at: int, **settings) -> SplitDecoder:
    halves = split_decoder(tiny_families.model(family).get_decoder(), at, **settings)
    assert isinstance(halves, SplitDecoder)
    return halves


def batch(padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(1, 27, (3, LENGTH))
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    if padding == "left":
        mask[0, :4] = mask[1, :1] = False
    if padding == "right":
        mask[0, 5:] = mask[1, 8:] = False
    return tokens, mask


def packed(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    tokens = torch.randint(1, 27, (1, sum(lengths)))
    return tokens, torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_anywhere_is_the_whole_to_the_last_bit(family, padding):
    halves = split(family, 0)
    tokens, mask = batch(padding)
    with torch.no_grad():
        theirs = halves.decoder(
            input_ids=tokens, attention_mask=mask, position_ids=positions(mask)
        ).last_hidden_state
        for halves.split in (0, 1, 2, 4):
            ours = halves.top(halves.trunk(tokens, mask), mask)
            torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_each_as_if_alone(family):
    halves = split(family, 2)
    lengths = (5, 1, LENGTH, 2)
    tokens, position_ids = packed(*lengths)
    with torch.no_grad():
        trunk = halves.trunk(tokens, None, position_ids)
        ours = halves.top(trunk, None, position_ids=position_ids)
        theirs = [halves.decoder(part).last_hidden_state for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(ours, torch.cat(theirs, dim=1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_whole_models_checkpointed_or_not(family):
    tokens, mask = batch("left")

    def gradients(hidden: torch.Tensor, decoder) -> dict[str, torch.Tensor]:
        # A sum of squares after a norm would have hardly any gradient.
        torch.manual_seed(4)
        (hidden * torch.randn_like(hidden))[mask].sum().backward()
        found = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
        return {n: g for n, g in found.items() if not n.startswith(BELOW)}

    whole = tiny_families.model(family).get_decoder()
    position_ids = positions(mask)
    theirs = gradients(
        whole(tokens, attention_mask=mask, position_ids=position_ids).last_hidden_state, whole
    )
    for checkpointing in (False, True):
        halves = split(family, 2, gradient_checkpointing=checkpointing)
        ours = gradients(halves.top(halves.trunk(tokens, mask), mask), halves.decoder)
        assert all(
            p.grad is None for n, p in halves.decoder.named_parameters() if n.startswith(BELOW)
        )
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5)


# What lies under the second layer, in every family's words.
BELOW = ("embed_tokens", "embed_in", "wte", "wpe", "layers.0.", "layers.1.", "h.0.", "h.1.")


def disturbed(family: str, **settings) -> SharedBackbone:
    settings = {"lora": LoraSettings(rank=4), "train_layers": 2} | settings
    backbone = SharedBackbone(tiny_families.model(family), **settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_together_are_each_alone_to_the_last_bit(family):
    backbone = disturbed(family, critic="adapter")
    names = ("policy", "reference", "critic")
    roles = [lambda name=name: backbone.role(name) for name in names]
    tokens, mask = batch("left")
    row, position_ids = packed(4, 7)
    for given in ((tokens, mask, None), (row, None, position_ids)):
        trunk = backbone.halves.trunk(*given)
        together = backbone.halves.top_together(trunk, given[1], roles, given[2])
        with torch.no_grad():
            alone = [backbone.halves.top(trunk, given[1], role, given[2]) for role in roles]
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
        assert not torch.allclose(alone[0], alone[1]) and not torch.allclose(alone[0], alone[2])
        assert not any(hidden.requires_grad for hidden in together)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sampled_is_what_a_plain_forward_says(family):
    backbone = disturbed(family)
    tokenizer = tiny.tokenizer()
    prompts = PromptSet.tokenize(
        [{"prompt": p} for p in ("the film", "a", "no plot")],
        tokenizer,
        context=64,
        response_length=12,
    ).batch()
    engine = DecodeEngine(backbone, tokenizer, response_length=12, stops=False)
    rollout = engine.generate(prompts, torch.Generator().manual_seed(0))
    mask = rollout.attention_mask
    assert not mask.all(), "no prompt is padded"
    with torch.no_grad(), backbone.role("policy") as decoder:
        hidden = decoder(
            rollout.tokens, attention_mask=mask, position_ids=positions(mask)
        ).last_hidden_state
    logprobs = backbone.head.logits(hidden).log_softmax(-1)
    start = prompts.tokens.shape[1]
    expected = logprobs[:, start - 1 : -1].gather(-1, rollout.responses[..., None])[..., 0]
    torch.testing.assert_close(rollout.rollout_logprobs, expected, rtol=0, atol=1e-4)

    mask[:, -1] = False  # the last token's state is not needed, so it was not computed
    trunk = backbone.trunk(rollout.tokens, rollout.attention_mask)
    assert rollout.trunk is not None
    states = rollout.trunk.device_rows
    torch.testing.assert_close(states[mask], trunk[mask], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_known_without_data(family):
    halves = split(family, 2)
    halves.decoder.to("meta")
    tokens, mask = (x.to("meta") for x in batch("left"))
    row, position_ids = (x.to("meta") for x in packed(4, 7))
    for given in ((tokens, mask, None), (row, None, position_ids)):
        trunk = halves.trunk(*given)
        hidden = halves.top(trunk, given[1], position_ids=given[2])
        assert trunk.shape == hidden.shape == (*given[0].shape, 32)
        hidden.sum().backward()


def test_beyond_the_length_where_long_rope_changes_is_refused():
    halves = split("phi3 with long rope", 2)
    tokens, position_ids = packed(32, 20)
    halves.trunk(tokens, None, position_ids)
    tokens, position_ids = packed(10, 33)
    with pytest.raises(UserError, match="keep prompt and response within 32"):
        halves.trunk(tokens, None, position_ids)


def test_attention_that_looks_ahead_is_not_split():
    assert family_of(Gemma3TextConfig()) is not None
    assert family_of(Gemma3TextConfig(use_bidirectional_attention=True)) is None


def test_layers_that_attend_otherwise_are_not_split():
    kinds = ["full_attention", "chunked_attention"]
    config = AutoConfig.for_model("qwen2", num_hidden_layers=2)
    assert family_of(config) is not None
    config.layer_types = kinds
    assert family_of(config) is None


def test_adapters_are_on_the_decoder_not_on_a_vision_tower(tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = sizes | dict(vocab_size=28, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    vision = sizes | dict(image_size=8, patch_size=4)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    backbone = SharedBackbone(Gemma3ForConditionalGeneration(config).eval(), train_layers=1)
    adapted = {n for n, p in backbone.named_parameters() if "lora_" in n}
    assert adapted and all("language_model.layers.1." in name for name in adapted)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.trainable():
            parameter.normal_()
    backbone.adapters.save(tmp_path, ["default"])
    torch.manual_seed(3)
    again = SharedBackbone(
        Gemma3ForConditionalGeneration(config).eval(), train_layers=1, adapter=tmp_path
    )
    pairs = zip(backbone.role_parameters("policy"), again.role_parameters("policy"), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    # Where there is nothing beside the decoder, the settings are those of any tool.
    assert SharedBackbone(tiny.model()).adapter_config.exclude_modules is None
