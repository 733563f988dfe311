"""Groups: who is repeated, what is dropped and replaced, and that nothing is mixed up."""

import pytest
import tiny
import torch

from fastrlhf.backbone import SharedBackbone
from fastrlhf.configs import GRPOConfig
from fastrlhf.data import PromptSet
from fastrlhf.rewards.functions import RewardScorer
from fastrlhf.rollout.decode import DecodeEngine
from fastrlhf.rollout.groups import GroupSampler, join

WORDS = ["a", "bcd", "ef", "ghijk", "l", "mn", "opq", "rs"]


@pytest.fixture(scope="module")
def engine():
    backbone = SharedBackbone(tiny.model(), train_layers=2, critic=None)
    return DecodeEngine(backbone, tiny.tokenizer(), response_length=6)


def prompts(words=WORDS):
    rows = [{"prompt": word, "number": i} for i, word in enumerate(words)]
    return PromptSet.tokenize(rows, tiny.tokenizer(), context=64, response_length=6)


def sampler(engine, reward, *, pool=None, **changes):
    config = GRPOConfig(
        batch_size=8, total_episodes=8, num_generations=2, response_length=6, **changes
    )
    pool = prompts() if pool is None else pool
    return GroupSampler(
        engine, RewardScorer(reward), pool, torch.Generator().manual_seed(0), config
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_prompts_completions_are_neighbours(engine):
    sampled = sampler(engine, lambda completions, **_: [float(len(c)) for c in completions])(
        prompts(WORDS[:4]), generator()
    )
    texts = sampled.rollout.prompts.texts
    assert texts == [word for word in WORDS[:4] for _ in range(2)]
    assert [row["number"] for row in sampled.rollout.prompts.columns] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(sampled.metrics) == {"group/scores", "group/zero_std"}


def contrast_in(*lively):
    """Two different scores for the completions of ``lively`` prompts, equal ones for the others."""

    def reward(prompts, **_):
        return [float(i % 2) if p in lively else 0.5 for i, p in enumerate(prompts)]

    return reward


def test_dull_groups_are_kept_without_dynamic_sampling(engine):
    sampled = sampler(engine, contrast_in("a"))(prompts(WORDS[:4]), generator())
    assert sampled.scores.isfinite().all()
    assert sampled.metrics == {"group/scores": 0.5, "group/zero_std": 0.75}


def test_dull_groups_are_replaced_by_fresh_ones(engine):
    """Of the pool's prompts two have contrast: dull groups give way to them, whole."""
    reward = contrast_in("a", "ghijk", "opq")
    make = sampler(engine, reward, pool=prompts(WORDS[3:]), algorithm="dapo", overlong_share=0.0)
    sampled = make(prompts(WORDS[:3]), generator())
    texts = sampled.rollout.prompts.texts
    assert texts[:2] == ["a", "a"] and set(texts[2:]) <= {"ghijk", "opq"}
    assert sampled.scores.tolist() == [0.0, 1.0] * 3
    assert sampled.metrics["group/zero_std"] == pytest.approx(2 / 3)
    assert sampled.metrics["group/dropped"] == 0 < sampled.metrics["group/resampled"]


def test_what_cannot_be_replaced_trains_nothing(engine):
    make = sampler(engine, contrast_in("a"), pool=prompts(WORDS[1:]), algorithm="dapo",
                   overlong_share=0.0)  # fmt: skip
    sampled = make(prompts(WORDS[:3]), generator())
    assert sampled.scores.isnan().tolist() == [False, False, True, True, True, True]
    assert sampled.metrics["group/dropped"] == 2
    assert sampled.metrics["group/resampled"] == 6, "three rounds of two"
    assert sampled.metrics["group/scores"] == 0.5


def test_a_rollout_of_dull_groups_is_kept(engine):
    make = sampler(engine, contrast_in(), algorithm="dapo", overlong_share=0.0)
    sampled = make(prompts(WORDS[:3]), generator())
    assert sampled.scores.isfinite().all()


def test_unjudged_completions_make_no_contrast(engine):
    def reward(prompts, **_):
        return [None if i % 2 else float(i) for i in range(len(prompts))]

    sampled = sampler(engine, reward)(prompts(WORDS[:3]), generator())
    assert sampled.metrics["group/zero_std"] == 1


def test_joined_rollouts_say_what_their_parts_said(engine):
    """Prompts of different widths: tokens, masks and log-probabilities belong together still."""
    device = engine.backbone.device
    short, long = prompts(["a", "ef"]).batch(device), prompts(["ghijk", "b"]).batch(device)
    parts = [engine.generate(short, generator()), engine.generate(long, generator(1))]
    rows = torch.tensor([1]), torch.tensor([1, 0])
    both = join(parts[0], rows[0], parts[1], rows[1])
    assert both.prompts.texts == ["ef", "b", "ghijk"]
    places = [(0, 1), (1, 1), (1, 0)]
    for row, (part, place) in enumerate(places):
        whole = parts[part]
        for name in ("responses", "response_mask", "rollout_logprobs", "ended"):
            assert torch.equal(getattr(both, name)[row], getattr(whole, name)[place]), name
        kept, before = both.attention_mask[row], whole.attention_mask[place]
        assert torch.equal(both.tokens[row][kept], whole.tokens[place][before])
        assert both.completions[row] == whole.completions[place]
    scored = engine.backbone.trunk(both.tokens, both.attention_mask)
    hidden = engine.backbone.hidden("policy", scored, both.attention_mask)[:, 4:-1]
    with torch.no_grad():
        logprobs = engine.backbone.head.logits(hidden).log_softmax(-1)
    again = logprobs.gather(-1, both.responses[..., None])[..., 0]
    mask = both.response_mask
    torch.testing.assert_close(again[mask], both.rollout_logprobs[mask], rtol=1e-4, atol=1e-4)


def test_the_overlong_penalty_reaches_the_scores(engine):
    reward = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    make = sampler(engine, reward, overlong_share=0.5)
    generate = make.engine.generate

    def shortened(given, generator):
        rollout = generate(given, generator)
        rollout.response_mask[::2, 4:] = False
        return rollout

    make.engine.generate = shortened
    sampled = make(prompts(WORDS), generator())
    del make.engine.generate
    lengths = sampled.rollout.response_mask.sum(1)
    expected = -((lengths - 3) / 3).clamp(0, 1)
    torch.testing.assert_close(sampled.scores, expected)
    assert sampled.scores.tolist()[:2] == [pytest.approx(-1 / 3), -1.0]
