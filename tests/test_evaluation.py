"""Held-out figures: distinct bigrams, unjudged completions, the penalty on both sides."""

from dataclasses import replace

import pytest
import tiny

from fastrlhf import PPOConfig, PPOTrainer, UserError
from fastrlhf.backbone import SharedBackbone

PROMPTS = [{"prompt": a + b} for a in "abcd" for b in "efgh"]
CONFIG = PPOConfig(response_length=4, eval_prompts=8, batch_size=4, total_episodes=4, num_samples=0)


def evaluate(reward, tmp_path, **changes):
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), **changes)
    trainer = PPOTrainer(
        SharedBackbone(tiny.model(), train_layers=1), reward, config, PROMPTS,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.folder.make()
    return trainer.evaluate("now", step=0)


def test_the_same_seed_gives_the_same_evaluation(tmp_path):
    def reward(completions, **_):
        return [float(len(c)) for c in completions]

    first, again = (evaluate(reward, tmp_path / name) for name in "ab")
    assert first == again
    assert first != evaluate(reward, tmp_path / "c", seed=2)
    assert first.kl == 0 and first.entropy > 0


def test_unjudged_completions_do_not_count(tmp_path):
    def some(completions, **_):
        return [None if i % 2 else 3.0 for i in range(len(completions))]

    result = evaluate(some, tmp_path)
    assert result.score == 3.0 and result.scores[:2] == [3.0, None]
    assert '"score": null' in (tmp_path / "run/samples.jsonl").read_text()
    with pytest.raises(UserError, match="None for every held-out prompt"):
        evaluate(lambda completions, **_: [None] * len(completions), tmp_path / "none")


def test_the_penalty_is_in_the_score(tmp_path):
    def zero(completions, **_):
        return [0.0] * len(completions)

    assert -1.0 <= evaluate(zero, tmp_path, missing_eos_penalty=1.0).score < 0
