"""Two halves make the whole: splitting a decoder changes nothing that it computes."""

import pytest
import tiny
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastrlhf.errors import UserError
from fastrlhf.trunk import SplitDecoder, WholeDecoder, positions, split_decoder


def qwen(config_class, model_class):
    settings = tiny.config().to_dict()
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings"
    )
    torch.manual_seed(0)
    return model_class(config_class(**{key: settings[key] for key in keys.split()})).eval()


FAMILIES = {
    "llama": tiny.model,
    "qwen2": lambda: qwen(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: qwen(Qwen3Config, Qwen3ForCausalLM),
}


def batch(padding: str):
    torch.manual_seed(1)
    tokens = torch.randint(1, 27, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    if padding == "left":
        mask[0, :4] = mask[1, :1] = False
    if padding == "right":
        mask[0, 5:] = mask[1, 8:] = False
    return tokens, mask


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("split", [0, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_equals_whole(family, split, padding):
    decoder = FAMILIES[family]().get_decoder()
    halves = split_decoder(decoder, split)
    assert isinstance(halves, SplitDecoder)
    tokens, mask = batch(padding)
    with torch.no_grad():
        ours = halves.top(halves.trunk(tokens, mask), mask)
        theirs = decoder(
            input_ids=tokens, attention_mask=mask, position_ids=positions(mask)
        ).last_hidden_state
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-6)


def test_a_wrong_position_would_be_seen():
    decoder = tiny.model().get_decoder()
    tokens, mask = batch("left")
    with torch.no_grad():
        right = decoder(tokens, attention_mask=mask, position_ids=positions(mask))
        wrong = decoder(tokens, attention_mask=mask, position_ids=positions(mask) * 2)
    gap = (right.last_hidden_state - wrong.last_hidden_state)[mask].abs().max()
    assert gap > 1e-3


def test_left_padding_changes_nothing():
    decoder = tiny.model().get_decoder()
    halves = split_decoder(decoder, 2)
    tokens = torch.randint(1, 27, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    mask = padded.new_ones(1, 8, dtype=torch.bool)
    mask[:, :3] = False
    whole = torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        alone = halves.top(halves.trunk(tokens, whole), whole)
        beside = halves.top(halves.trunk(padded, mask), mask)[:, 3:]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)


def test_other_families_run_whole():
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=28, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    decoder = GPT2LMHeadModel(settings).eval().get_decoder()
    halves = split_decoder(decoder, 1)
    assert isinstance(halves, WholeDecoder)
    tokens, mask = batch("left")
    assert halves.trunk(tokens, mask) is tokens
    with torch.no_grad():
        ours = halves.top(tokens, mask)
        theirs = decoder(tokens, attention_mask=mask, position_ids=positions(mask))
    torch.testing.assert_close(ours, theirs.last_hidden_state)


def test_checkpointing_is_refused_where_it_would_do_nothing():
    decoder = GPT2LMHeadModel(
        GPT2Config(vocab_size=28, n_embd=32, n_layer=2, n_head=4)
    ).get_decoder()
    with pytest.raises(UserError, match="this one is gpt2"):
        split_decoder(decoder, 1, gradient_checkpointing=True)


def test_checkpointing_keeps_loss_and_gradient():
    tokens, mask = batch("left")
    gradients = []
    for checkpointing in (False, True):
        decoder = tiny.model().get_decoder()
        halves = split_decoder(decoder, 2, gradient_checkpointing=checkpointing)
        halves.top(halves.trunk(tokens, mask), mask)[mask].square().sum().backward()
        gradients.append(decoder.layers[2].mlp.up_proj.weight.grad)
        assert decoder.layers[1].mlp.up_proj.weight.grad is None
    torch.testing.assert_close(*gradients)
