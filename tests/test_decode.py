"""The decode loop samples what a plain forward says; its log-probabilities are that forward's."""

from copy import deepcopy

import pytest
import tiny
import tiny_families
import torch
import torch.nn.functional as F

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.data import PromptSet
from fastrlhf.errors import SelfCheckError
from fastrlhf.rollout import decode
from fastrlhf.rollout.decode import DecodeEngine
from fastrlhf.rollout.steps import FamilySteps
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
            parameter.add_(torch.randn_like(parameter) * 0.05)
        # The row of a padding token starts at zero; a stop token must be likely enough to be drawn.
        b.head.weight[0] = b.head.weight[5]
    return b


def make_engine(backbone, **settings):
    return DecodeEngine(backbone, TOKENIZER, response_length=12, **settings)


def generate(backbone, temperature=1.0, stops=True, seed=0, slots=None):
    engine = make_engine(backbone, temperature=temperature, stops=stops, slots=slots)
    return engine.generate(PROMPTS.batch(), torch.Generator().manual_seed(seed))


def plain_logits(head, hidden) -> torch.Tensor:
    logits = F.linear(hidden, head.weight, head.bias) * head.logit_scale
    if head.softcap is not None:
        logits = (logits / head.softcap).tanh() * head.softcap
    return logits


def plain_logprobs(backbone, rollout, temperature=1.0) -> torch.Tensor:
    """Of the sampled tokens, from one forward of transformers' decoder, in the model's dtype."""
    mask, head = rollout.attention_mask, backbone.head
    with torch.no_grad(), backbone.role("policy") as decoder:
        hidden = decoder(
            rollout.tokens, attention_mask=mask, position_ids=positions(mask)
        ).last_hidden_state
        logprobs = (plain_logits(head, hidden) / temperature).log_softmax(-1)
    start = rollout.prompts.tokens.shape[1]
    return logprobs[:, start - 1 : -1].gather(-1, rollout.responses[..., None])[..., 0]


def true_logprobs(backbone, rollout, temperature) -> torch.Tensor:
    """Of the sampled tokens, in float64, of each sequence alone and without padding.

    Eager attention's softmax is in float32, where float64's lowest number is minus infinity: a row
    that sees nothing, as padding does, would be NaN.
    """
    precise, truth = deepcopy(backbone).double(), rollout.rollout_logprobs.double().zero_()
    for row, kept in enumerate(rollout.attention_mask):
        tokens, own = rollout.tokens[row, kept][None], rollout.response_mask[row]
        with torch.no_grad(), precise.role("policy") as decoder:
            hidden = decoder(tokens).last_hidden_state
        logits = plain_logits(precise.head, hidden[0, :-1]) / temperature
        found = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        truth[row, own] = found[-int(own.sum()) :]
    return truth


def assert_logprobs_are_right(backbone, rollout, temperature=1.0):
    """From a forward in float64 as far as transformers' forward in float32 is, and 1e-4 more."""
    kept = rollout.response_mask
    truth = true_logprobs(backbone, rollout, temperature)[kept]
    theirs = (plain_logprobs(backbone, rollout, temperature)[kept] - truth).abs().max()
    ours = (rollout.rollout_logprobs[kept] - truth).abs().max()
    assert ours <= theirs + 1e-4
    assert (rollout.rollout_logprobs[~kept] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("slots", [None, 5])
def test_logprobs_are_those_of_a_plain_forward(backbone, temperature, slots):
    rollout = generate(backbone, temperature, slots=slots)
    assert_logprobs_are_right(backbone, rollout, temperature)


def test_the_models_logits_have_a_real_ones_scale(backbone):
    """What a probability is rounded by grows with its logits: as sharp as a language model."""
    rollout = generate(backbone)
    truth = true_logprobs(backbone, rollout, 1.0)[rollout.response_mask]
    assert -5 < truth.mean() < -0.5 and truth.min() > -20


@pytest.mark.parametrize("what", ["states in bfloat16", "another temperature"])
def test_wrong_logprobs_are_seen(backbone, what):
    engine = make_engine(backbone)
    draw = engine.draw
    if what == "another temperature":
        engine.temperature = 1.0005
    else:
        engine.draw = lambda hidden, uniform: draw(hidden.bfloat16().float(), uniform)
    rollout = engine.generate(PROMPTS.batch(), torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        assert_logprobs_are_right(backbone, rollout)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_every_family_is_sampled_as_its_own_forward_says(family, attention):
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no soft cap in sdpa")
    model = tiny_families.model(family)
    model.set_attn_implementation(attention)
    backbone = SharedBackbone(model, lora=LoraSettings(rank=4), train_layers=2)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rollout = generate(backbone, temperature=3.0, slots=5)
    assert len(set(rollout.response_mask.sum(1).tolist())) > 1, "no sequence ends before another"
    assert_logprobs_are_right(backbone, rollout, temperature=3.0)
    kept = rollout.sequences.inputs
    again = backbone.trunk(rollout.tokens, rollout.attention_mask)
    states = torch.cat([rollout.trunk.device_rows, rollout.trunk.host_rows])
    torch.testing.assert_close(states[kept], again[kept], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("slots", [1, 3, 7, 100])
def test_slots_change_no_token(backbone, slots):
    """In float64, where no draw is near enough to the edge of a token for rounding to matter."""
    precise = deepcopy(backbone).double()
    rollout, other = generate(precise), generate(precise, slots=slots)
    for name in ("tokens", "attention_mask", "response_mask", "ended"):
        assert torch.equal(getattr(rollout, name), getattr(other, name)), name
    assert rollout.completions == other.completions
    torch.testing.assert_close(rollout.rollout_logprobs, other.rollout_logprobs)
    kept = rollout.sequences.inputs
    states = [r.trunk.device_rows[kept] for r in (rollout, other)]
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-9)


def test_a_sequence_says_the_same_whoever_is_beside_it(backbone):
    """Other prompts and another padding; its numbers are those of its row."""
    precise = deepcopy(backbone).double()
    alone, beside = (
        PromptSet.tokenize([{"prompt": p} for p in texts], TOKENIZER, context=64,
                           response_length=12).batch()
        for texts in (("a", "a"), ("a", "a", "a much longer prompt"))
    )  # fmt: skip
    engine = make_engine(precise)
    numbers = [
        engine.generate(prompts, torch.Generator().manual_seed(2)).completion_ids()
        for prompts in (alone, beside)
    ]
    assert numbers[0] == numbers[1][:2]


def count_forwards(monkeypatch) -> list[tuple[str, int]]:
    """Which forwards were run, and of how many rows."""
    seen: list[tuple[str, int]] = []
    for name in ("prompts", "tokens"):
        run = getattr(FamilySteps, name)

        def counted(self, tokens, *args, name=name, run=run):
            seen.append((name, len(tokens)))
            return run(self, tokens, *args)

        monkeypatch.setattr(FamilySteps, name, counted)
    return seen


def test_a_prompt_runs_once_and_what_ended_does_not_run(backbone, monkeypatch):
    seen = count_forwards(monkeypatch)
    rollout = generate(backbone)
    lengths = rollout.response_mask.sum(1)
    assert seen[0] == ("prompts", 3), "twelve sequences of three prompts"
    assert [name for name, _ in seen[1:]] == ["tokens"] * (int(lengths.max()) - 1)
    # A sequence of n tokens takes n - 1 steps: its last token predicts nothing.
    assert sum(rows for name, rows in seen if name == "tokens") == int((lengths - 1).sum())


def test_slots_are_refilled(backbone, monkeypatch):
    """Slots that waited for the longest of their four would need more steps."""
    seen = count_forwards(monkeypatch)
    engine = make_engine(backbone, slots=4)
    stops = lambda uniform: torch.where(uniform < 0.25, 0, 5)  # noqa: E731
    engine.draw = lambda hidden, uniform: (stops(uniform), torch.zeros(len(hidden)))
    rollout = engine.generate(PROMPTS.batch(), torch.Generator().manual_seed(0))
    lengths = rollout.response_mask.sum(1)
    steps = [rows for name, rows in seen if name == "tokens"]
    assert max(steps) <= 4 and sum(steps) == int((lengths - 1).sum())
    assert len(steps) < int((lengths.view(-1, 4).max(1).values - 1).sum())


def test_no_layer_keeps_another_forward(backbone):
    generate(backbone)
    assert not any("forward" in vars(module) for module in backbone.modules())


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


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("whole", [False, True])
def test_logits_that_are_not_numbers_end_the_run_in_words(backbone, monkeypatch, stops, whole):
    if whole:
        monkeypatch.setattr(DecodeEngine, "family", lambda *_: None)
    weight = backbone.head.weight
    with torch.no_grad():
        before = weight[7].clone()
        weight[7] = torch.nan
    with pytest.raises(SelfCheckError, match="logits have NaN"):
        generate(backbone, stops=stops)
    with torch.no_grad():
        weight[7] = before
    # On a GPU the draw itself does not wait: it gives a token that is none.
    monkeypatch.setattr(
        decode, "sample", lambda logits, **_: (torch.full(logits.shape[:1], -1), logits[:, 0])
    )
    with pytest.raises(SelfCheckError, match="logits have NaN"):
        generate(backbone, stops=stops)


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
