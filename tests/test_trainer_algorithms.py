"""What the trainer does for algorithms as a run goes on: coefficients, early stops, groups."""

import json

import pytest
import tiny
import torch

from fastrlhf import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, UserError
from fastrlhf.backbone import LoraSettings, SharedBackbone

PROMPTS = [{"prompt": a + b} for a in "abcdefgh" for b in "ijklmnop"]


def share_of_e(completions, **_):
    return [text.count("e") / 4 for text in completions]


def train(tmp_path, kind=PPOConfig, reward=share_of_e, rollouts=3, **changes):
    settings = dict(
        batch_size=16, total_episodes=16 * rollouts, response_length=4, learning_rate=1e-2,
        train_layers=2, microbatch_tokens=10**4, eval_prompts=4, num_samples=0,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    config = kind(**settings | changes)
    torch.manual_seed(0)
    backbone = SharedBackbone(
        tiny.model(), lora=LoraSettings(8, 32.0), train_layers=2, critic=config.critic
    )
    trainer = {PPOConfig: PPOTrainer, GRPOConfig: GRPOTrainer}[kind](
        backbone, reward, config, PROMPTS, processing_class=tiny.tokenizer()
    )
    summary = trainer.train()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    return trainer, summary, [json.loads(line) for line in lines]


def test_the_adaptive_coefficient_follows_the_kl(tmp_path):
    """Below its target it falls, and what was trained with is what is told."""
    trainer, _, lines = train(
        tmp_path, kl_controller="adaptive", kl_target=50.0, kl_horizon=160.0, kl_coef=0.1
    )
    assert [line["kl_coef"] for line in lines] == pytest.approx([0.1, 0.098, 0.09604])
    assert trainer.state.kl.coef == pytest.approx(0.1 * 0.98**3)
    for line in lines:
        assert line["objective/non_score_reward"] == -line["kl_coef"] * line["objective/kl"]


def test_a_fixed_coefficient_is_no_metric(tmp_path):
    _, _, lines = train(tmp_path, rollouts=1)
    assert "kl_coef" not in lines[0] and "old_kl_coef" not in lines[0]


def test_the_penalty_of_ppo_kl_adapts(tmp_path):
    _, _, lines = train(tmp_path, algorithm="ppo_kl", old_kl_target=1e-9, kl_coef=0.0)
    assert [line["old_kl_coef"] for line in lines] == [1.0, 2.0, 4.0]


def test_target_kl_ends_the_updates_on_a_rollout(tmp_path, monkeypatch):
    steps = []
    update = PPOTrainer.update
    monkeypatch.setattr(
        PPOTrainer, "update", lambda *given, **rest: steps.append(1) or update(*given, **rest)
    )
    train(tmp_path / "a", rollouts=1, target_kl=1e-9)
    assert len(steps) == 2, "the second epoch sees what the first one did"
    steps.clear()
    train(tmp_path / "b", rollouts=1)
    assert len(steps) == 4


def test_kl_limit_ends_the_run(tmp_path):
    _, summary, lines = train(tmp_path, rollouts=6, kl_limit=1e-4, kl_coef=0.0)
    assert len(lines) == summary.steps == 2
    assert lines[0]["objective/kl"] == 0 < lines[1]["objective/kl"]
    assert (tmp_path / "run/checkpoints/final/adapter_model.safetensors").exists()


def test_a_run_whose_scores_never_differ_ends_all_the_same(tmp_path):
    """No group teaches anything: nothing is dropped, nothing moves, nothing fails."""
    _, summary, lines = train(
        tmp_path, GRPOConfig, lambda completions, **_: [1.0] * len(completions),
        algorithm="dapo", num_generations=4, overlong_share=0.0,
    )  # fmt: skip
    assert summary.kl == 0 and summary.score_after == 1
    assert all(line["group/zero_std"] == 1 for line in lines)


def test_dropped_groups_are_told(tmp_path):
    def reward(prompts, completions, **_):
        e = share_of_e(completions)
        return [x if p[0] < "c" else 0.0 for p, x in zip(prompts, e, strict=True)]

    _, _, lines = train(
        tmp_path, GRPOConfig, reward,
        algorithm="dapo", num_generations=4, overlong_share=0.0, dynamic_sampling=1,
    )  # fmt: skip
    assert sum(line["group/dropped"] for line in lines) > 0
    assert all(line["check/first_ratio"] == 1 for line in lines)


def test_a_missing_eos_costs_its_penalty(tmp_path):
    _, _, lines = train(tmp_path, reward=lambda completions, **_: [0.0] * len(completions),
                        rollouts=1, missing_eos_penalty=1.0)  # fmt: skip
    ended = lines[0]["val/num_eos_tokens"]
    assert lines[0]["objective/scores"] == pytest.approx(-(16 - ended) / 16)


@pytest.mark.parametrize("way", ["sorted", "packed", "in_order"])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "dapo"])
def test_groups_in_every_layout(tmp_path, way, algorithm):
    """Replaced groups have no recorded trunk: the first ratio is 1 with and without its cache."""
    for cached in (True, False):
        _, _, lines = train(
            tmp_path / str(cached), GRPOConfig, lambda prompts, completions, **_: [
                x if p[0] < "e" else 0.0
                for p, x in zip(prompts, share_of_e(completions), strict=True)
            ],
            rollouts=2, algorithm=algorithm, num_generations=4, dynamic_sampling=1, kl_coef=0.05,
            overlong_share=0.0, microbatching=way, microbatch_tokens=30, trunk_cache=cached,
        )  # fmt: skip
        for line in lines:
            assert line["check/first_ratio"] == 1 and line["memory/retries"] == 0
        assert sum(line["group/resampled"] for line in lines) > 0


def test_sampled_old_logprobs_learn_as_scored_ones(tmp_path, monkeypatch):
    """The same updates to rounding, without a forward of scoring."""
    import fastrlhf.experience as experience

    settings = dict(kind=GRPOConfig, num_generations=4)
    _, scored, expected = train(tmp_path / "scored", **settings)
    calls = []
    monkeypatch.setattr(experience, "score_tokens", lambda *_: calls.append(1))
    monkeypatch.setattr("fastrlhf.evaluation.score", experience.score)
    _, sampled, lines = train(tmp_path / "sampled", old_logprobs="sampled", **settings)
    assert not calls and sampled.kl is None and scored.kl is not None
    for line, other in zip(lines, expected, strict=True):
        assert line["objective/scores"] == other["objective/scores"]
        assert line["loss/policy"] == pytest.approx(other["loss/policy"], abs=1e-5)
        assert line["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert "objective/kl" not in line or line["objective/kl"] is None
    assert sampled.score_after == pytest.approx(scored.score_after, abs=1e-6)


@pytest.mark.parametrize("changes", [dict(kl_coef=0.1), dict(kl_limit=1.0)])
def test_sampled_old_logprobs_know_no_kl(changes):
    with pytest.raises(UserError, match="set old_logprobs to scored"):
        GRPOConfig(old_logprobs="sampled", **changes)
    with pytest.raises(UserError, match="a critic"):
        PPOConfig(old_logprobs="sampled", kl_coef=0.0)
