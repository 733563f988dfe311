"""The decode loop samples what a plain forward says; its log-probabilities are that forward's."""

import pytest
import tiny
import torch

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.data import PromptSet
from fastrlhf.rollout.decode import DecodeEngine
from fastrlhf.trunk import positions

TOKENIZER = tiny.tokenizer()
PROMPTS = PromptSet.tokenize(
    [{"prompt": p} for p in ("the film", "a", "no plot")] * 4,
    TOKENIZER,
    context=64,
    response_length=12,
)


@pytest.fixture(scope="module")
def backbone() -> SharedBackbone:
    b = SharedBackbone(tiny.model(), lora=LoraSettings(rank=4), train_layers=2)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in b.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        # The row of a padding token starts at zero; a stop token must be likely enough to be drawn.
        b.head.weight[0] = b.head.weight[5]
    return b


def generate(backbone, temperature=1.0, stops=True, seed=0):
    engine = DecodeEngine(
        backbone, TOKENIZER, response_length=12, temperature=temperature, stops=stops
    )
    return engine.generate(PROMPTS.batch(), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_plain_forward(backbone, temperature):
    rollout = generate(backbone, temperature)
    mask = rollout.attention_mask
    with torch.no_grad(), backbone.role("policy") as decoder:
        hidden = decoder(
            rollout.tokens, attention_mask=mask, position_ids=positions(mask)
        ).last_hidden_state
    logprobs = (backbone.head.logits(hidden) / temperature).log_softmax(-1)
    start = rollout.prompts.tokens.shape[1]
    expected = logprobs[:, start - 1 : -1].gather(-1, rollout.responses[..., None])[..., 0]
    kept = rollout.response_mask
    torch.testing.assert_close(rollout.rollout_logprobs[kept], expected[kept], rtol=0, atol=1e-4)
    assert (rollout.rollout_logprobs[~kept] == 0).all()


def test_a_response_ends_with_its_stop_token_which_trains(backbone):
    rollout = generate(backbone)
    assert rollout.ended.any(), "no sequence ended: the test shows nothing"
    for row in range(len(PROMPTS)):
        kept = rollout.response_mask[row]
        length = int(kept.sum())
        assert kept[:length].all() and not kept[length:].any()
        tokens = rollout.responses[row]
        assert bool(rollout.ended[row]) == bool((tokens[:length] == 0).any())
        if rollout.ended[row]:
            assert tokens[length - 1] == 0 and (tokens[: length - 1] != 0).all()


def test_without_stopping_every_response_is_full_length(backbone):
    rollout = generate(backbone, stops=False)
    assert rollout.response_mask.all() and not rollout.ended.any()


def test_same_seed_same_rollout(backbone):
    assert torch.equal(generate(backbone, seed=3).tokens, generate(backbone, seed=3).tokens)
    assert not torch.equal(generate(backbone, seed=3).tokens, generate(backbone, seed=4).tokens)


def test_near_zero_temperature_is_greedy_search_of_transformers():
    model = tiny.model(seed=2)
    prompts = PROMPTS.take([0, 1, 2]).batch()
    theirs = model.generate(
        prompts.tokens, attention_mask=prompts.attention_mask, max_new_tokens=12, do_sample=False
    )
    b = SharedBackbone(model, train_layers=1)
    engine = DecodeEngine(b, TOKENIZER, response_length=12, temperature=1e-4)
    ours = engine.generate(prompts, torch.Generator().manual_seed(0)).tokens
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)
