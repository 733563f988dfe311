"""The whole line on a tiny random model: it learns, checks itself, and keeps what it wrote."""

import json
import math
from dataclasses import replace

import pytest
import tiny
import tiny_families
import torch

import fastrlhf.trainer as module
from fastrlhf import PPOConfig, PPOTrainer, SelfCheckError, UserError, experience
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.trunk import positions
from fastrlhf_kernels import VocabTensorError

PROMPTS = [{"prompt": a + b} for a in "abcdefgh" for b in "ijklmnop"]
FAST = PPOConfig(
    total_episodes=64,
    batch_size=32,
    num_mini_batches=2,
    num_ppo_epochs=2,
    response_length=8,
    stop_token=None,
    learning_rate=1e-2,
    train_layers=2,
    lora_rank=8,
    kl_coef=0.02,
    microbatch_tokens=80,
    eval_prompts=16,
    num_samples=0,
)


def share_of_e(completions, **_):
    return [text.count("e") / 8 for text in completions]


def trainer(tmp_path, reward=share_of_e, backbone=None, **changes) -> PPOTrainer:
    config = replace(FAST, output_dir=str(tmp_path / "run"), **changes)
    if backbone is None:
        torch.manual_seed(config.seed)
        backbone = SharedBackbone(
            tiny.model(),
            lora=LoraSettings(config.lora_rank, config.lora_alpha),
            train_layers=config.train_layers,
            critic=config.critic,
        )
    return PPOTrainer(backbone, reward, config, PROMPTS, processing_class=tiny.tokenizer())


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic": "adapter"},
        {"kl_estimator": "k1"},
        {"kl_estimator": "k3", "temperature": 0.8},
    ],
    ids=["exact", "adapter", "k1", "k3"],
)
def test_it_learns(tmp_path, changes):
    summary = trainer(tmp_path, total_episodes=32 * 20, **changes).train()
    # Over 32 seeds it gains 0.28 to 0.61.
    assert summary.score_after > summary.score_before + 0.25
    metrics = lines(tmp_path)
    assert len(metrics) == summary.steps == 20
    assert metrics[0]["objective/kl"] == 0
    for line in metrics:
        assert line["check/first_ratio"] == 1.0
        assert line["check/first_approx_kl"] == 0.0
        assert line["check/first_clipfrac"] == 0.0
        assert line["objective/kl"] >= 0
        assert line["rollout/logprob_gap_max"] < 1e-4
    assert metrics[-1]["objective/kl"] > 0.1


def test_kl_coef_holds_the_policy_back(tmp_path):
    free = trainer(tmp_path / "a", total_episodes=32 * 12, kl_coef=0.0).train()
    held = trainer(tmp_path / "b", total_episodes=32 * 12, kl_coef=2.0).train()
    assert held.kl < free.kl / 4
    assert held.score_after < free.score_after


def test_the_same_seed_gives_the_same_run(tmp_path):
    runs = []
    for name in ("a", "b"):
        trainer(tmp_path / name).train()
        kept = [
            {k: v for k, v in line.items() if not k.startswith("time/")}
            for line in lines(tmp_path / name)
        ]
        runs.append(kept)
    assert runs[0] == runs[1]


def test_microbatches_change_only_rounding(tmp_path):
    trainer(tmp_path / "a", microbatch_tokens=10**6).train()
    trainer(tmp_path / "b", microbatch_tokens=33).train()
    (first, *_), (other, *_) = lines(tmp_path / "a"), lines(tmp_path / "b")
    for key in ("loss/policy", "loss/value", "policy/approx_kl", "policy/clipfrac"):
        assert other[key] == pytest.approx(first[key], rel=2e-2, abs=1e-5), key


def test_a_run_leaves_its_folder(tmp_path):
    summary = trainer(tmp_path, num_samples=1).train()
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "summary.json",
        "plot.png", "checkpoints", "given.json",
    }  # fmt: skip
    assert (run / "checkpoints/final/adapter_model.safetensors").stat().st_size > 0
    assert json.loads((run / "summary.json").read_text())["steps"] == summary.steps
    samples = (run / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 * FAST.eval_prompts
    assert summary.peak_memory_mb > 50 and summary.seconds > 0
    assert set(summary.phase_seconds) == {"load", "evaluate", "rollout", "score", "update"}


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path):
    trainer(tmp_path).train()
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        trainer(tmp_path).train()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_reward_that_fails_stops_before_anything_is_lost(tmp_path):
    with pytest.raises(UserError, match="returned nan"):
        trainer(tmp_path, reward=lambda completions, **_: [math.nan] * len(completions))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_later_keeps_what_was_written(tmp_path):
    calls = []

    def reward(completions, **_):
        calls.append(1)
        return [0.0 if len(calls) < 4 else math.nan] * len(completions)

    with pytest.raises(UserError, match="returned nan"):
        trainer(tmp_path, reward=reward).train()
    assert len(lines(tmp_path)) == 1


def test_unjudged_completions_train_nothing(tmp_path):
    def only_some(prompts, completions, **_):
        # In a whole batch the prompts that start with "a" to "d" are judged.
        if len(prompts) < 8:
            return [0.0] * len(prompts)
        return [None if p[0] > "d" else c.count("e") / 8 for p, c in zip(prompts, completions)]  # noqa: B905

    trainer(tmp_path, reward=only_some).train()
    assert all(math.isfinite(line["loss/policy"]) for line in lines(tmp_path))
    with pytest.raises(SelfCheckError, match="every score was None"):
        trainer(
            tmp_path / "none",
            reward=lambda prompts, **_: [None if len(prompts) == 32 else 0.0] * len(prompts),
        ).train()


def test_audit_passes_ours_and_catches_a_head_that_makes_all_logits(tmp_path, monkeypatch):
    import fastrlhf.losses as losses

    def run(name):
        # A microbatch has 40 rows of logits or more: 0.8 MB, of which the workspace allows 0.5.
        torch.manual_seed(0)
        backbone = SharedBackbone(tiny.model(vocab_size=5000), train_layers=2)
        trainer(
            tmp_path / name, backbone=backbone, audit=True, workspace_mb=1, microbatch_tokens=96
        ).train()

    run("ours")

    def eager(hidden, weight, *args, **kwargs):
        hidden @ weight.t()
        raise AssertionError("the audit let it pass")

    monkeypatch.setattr(losses, "linear_policy_loss", eager)
    with pytest.raises(VocabTensorError):
        run("eager")


def shift_logprobs(t, monkeypatch):
    """Errors that cancel in the mean."""
    noise = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    change_score(t, monkeypatch, lambda e: replace(e, old_logprobs=e.old_logprobs + 1e-2 * noise))


def shift_positions(t, monkeypatch):
    """The update sees other positions than scoring did."""
    original = experience.microbatch_loss

    def update(backbone, *args):
        with monkeypatch.context() as patch:
            patch.setattr("fastrlhf.trunk.positions", lambda mask: positions(mask) * 2)
            return original(backbone, *args)

    monkeypatch.setattr(experience, "microbatch_loss", update)


def sample_at_another_temperature(t, monkeypatch):
    t.engine.temperature = 0.5


def start_away_from_the_reference(t, monkeypatch):
    with torch.no_grad():
        for name, parameter in t.backbone.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)


def lose_a_number(t, monkeypatch):
    change_score(t, monkeypatch, lambda e: replace(e, old_logprobs=e.old_logprobs * torch.nan))


def change_score(t, monkeypatch, change):
    original = module.score
    monkeypatch.setattr(module, "score", lambda *given: change(original(*given)))


@pytest.mark.parametrize(
    "mutation",
    [
        shift_logprobs,
        shift_positions,
        sample_at_another_temperature,
        start_away_from_the_reference,
        lose_a_number,
    ],
)
def test_self_checks_can_fail(tmp_path, monkeypatch, mutation):
    t = trainer(tmp_path)
    mutation(t, monkeypatch)
    with pytest.raises(SelfCheckError):
        t.train()


def test_an_interrupted_run_keeps_its_weights(tmp_path):
    t = trainer(tmp_path)
    original, calls = t.engine.generate, []

    def generate(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*given)

    t.engine.generate = generate
    with pytest.raises(KeyboardInterrupt):
        t.train()
    assert (tmp_path / "run/checkpoints/interrupted/adapter_model.safetensors").exists()
    assert len(lines(tmp_path)) == 1


def test_a_model_that_runs_whole(tmp_path):
    with pytest.warns(UserWarning, match="run whole"):
        backbone = SharedBackbone(tiny_families.unknown(), train_layers=1)
    summary = trainer(tmp_path, backbone=backbone, total_episodes=32 * 12).train()
    assert summary.score_after > summary.score_before + 0.2
    assert lines(tmp_path)[0]["check/first_ratio"] == 1


def test_bf16_weights(tmp_path):
    torch.manual_seed(0)
    backbone = SharedBackbone(tiny.model().to(torch.bfloat16), train_layers=2)
    summary = trainer(tmp_path, backbone=backbone, total_episodes=32 * 20).train()
    assert summary.score_after > summary.score_before + 0.2
    assert lines(tmp_path)[0]["check/first_clipfrac"] == 0


def test_what_a_backbone_must_bring(tmp_path):
    backbone = SharedBackbone(tiny.model(), train_layers=2, critic=None)
    with pytest.raises(UserError, match="needs a backbone with a critic"):
        trainer(tmp_path, backbone=backbone)
    with pytest.raises(UserError, match="pass processing_class"):
        PPOTrainer(SharedBackbone(tiny.model(), train_layers=2), share_of_e, FAST, PROMPTS)


def test_eval_prompts_do_not_train(tmp_path):
    def make(train):
        return PPOTrainer(
            SharedBackbone(tiny.model(), train_layers=2), share_of_e, FAST, train,
            eval_dataset=PROMPTS[:8], processing_class=tiny.tokenizer(),
        )  # fmt: skip

    assert len(make(PROMPTS).train_prompts) == len(PROMPTS) - 8
    with pytest.raises(UserError, match="every training prompt"):
        make(PROMPTS[:8])


@pytest.mark.parametrize("way", ["sorted", "packed", "in_order"])
def test_the_first_ratio_is_one_in_every_mode(tmp_path, way):
    for cached in (True, False):
        backbone = SharedBackbone(tiny.model(), train_layers=2)
        with torch.no_grad():
            # A padding token's row starts at zero; a stop token must be likely enough to be drawn.
            backbone.head.weight[0] = backbone.head.weight[5]
        changes = dict(microbatching=way, trunk_cache=cached, stop_token="eos")
        trainer(tmp_path / str(cached), backbone=backbone, total_episodes=96, **changes).train()
        metrics = lines(tmp_path / str(cached))
        assert len(metrics) == 3 and metrics[0]["val/num_eos_tokens"] > 0
        for line in metrics:
            assert line["check/first_ratio"] == 1.0 and line["check/first_approx_kl"] == 0.0
            assert line["memory/retries"] == 0 and line["memory/microbatch_tokens"] == 80


def test_without_a_reference_no_kl_is_claimed(tmp_path):
    backbone = SharedBackbone(tiny.model(), train_layers=2)
    backbone.has_reference = False
    with pytest.raises(UserError, match="set kl_coef to 0"):
        trainer(tmp_path, backbone=backbone)
    summary = trainer(tmp_path, backbone=backbone, kl_coef=0.0).train()
    assert summary.kl is None and summary.score_after > -1
    for line in lines(tmp_path):
        assert not {"objective/kl", "objective/non_score_reward"} & line.keys()
        assert math.isfinite(line["loss/policy"]) and line["check/first_ratio"] == 1
