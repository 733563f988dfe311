"""Settings by algorithm: defaults, what contradicts them, and the trainers' and verbs' names."""

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch

import fastrlhf
from fastrlhf import UserError
from fastrlhf.algorithm_settings import DEFAULTS, GROUP_ALGORITHMS, READ_BY, AlgorithmName
from fastrlhf.algorithms import ALGORITHMS
from fastrlhf.cli import main
from fastrlhf.config import PPOConfig, load_config
from fastrlhf.configs import CONFIGS, GRPOConfig, ReinforceConfig, RLOOConfig
from fastrlhf.trainers import TRAINERS, GRPOTrainer, PPOTrainer

MATH = Path(__file__).parent.parent / "docs" / "math.md"


def test_every_list_of_algorithms_is_the_table():
    names = set(ALGORITHMS)
    assert set(AlgorithmName.__args__) == names == set(DEFAULTS)
    assert {name for kind in CONFIGS.values() for name in kind.family} == names
    assert sum(len(kind.family) for kind in CONFIGS.values()) == len(names)
    assert set(GROUP_ALGORITHMS) == {n for n, row in DEFAULTS.items() if row["num_generations"] > 1}
    assert {name for readers in READ_BY.values() for name in readers} <= names
    assert CONFIGS.keys() == TRAINERS.keys()


def test_the_documented_table_is_the_table():
    """docs/math.md, section 9: every row with its equation, source and deviation, in order."""
    section = MATH.read_text().split("## 9. ")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")][1:]
    expected = [
        f"| `{row.name}` | {row.equation} | {row.aggregation} | {row.source} | {row.deviation} |"
        for row in ALGORITHMS.values()
    ]
    assert rows == expected


@pytest.mark.parametrize("name", ALGORITHMS)
def test_defaults_are_the_rows(name):
    (kind,) = [kind for kind in CONFIGS.values() if name in kind.family]
    config = kind(algorithm=name)
    for key, value in DEFAULTS[name].items():
        assert getattr(config, key) == value, key
    assert kind.__module__ == "fastrlhf.config" or dataclasses.fields(kind) != ()


def test_what_users_of_trl_find():
    grpo, rloo, ppo = GRPOConfig(), RLOOConfig(), PPOConfig()
    assert (grpo.num_generations, grpo.kl_coef, grpo.cliprange, grpo.scale_rewards) == (
        8, 0.0, 0.2, "group",
    )  # fmt: skip
    assert (rloo.num_generations, rloo.kl_coef, rloo.kl_estimator) == (2, 0.05, "k1")
    assert (ppo.num_ppo_epochs, ppo.cliprange, ppo.cliprange_value, ppo.vf_coef) == (
        4, 0.2, 0.2, 0.1,
    )  # fmt: skip
    for key, here in (("epsilon", "cliprange"), ("beta", "kl_coef"), ("delta", "dual_clip")):
        with pytest.raises(UserError, match=f"TRL's {key} is '{here}' here"):
            load_config(None, [(key, "0.1")], GRPOConfig)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (GRPOConfig, dict(algorithm="ppo"), "must be grpo or dr_grpo or dapo or gspo or cispo"),
        (GRPOConfig, dict(algorithm="grop"), "'grop' does not fit"),
        (GRPOConfig, dict(num_generations=1), "num_generations must be at least 2: grpo compares"),
        (
            GRPOConfig, dict(num_generations=7),
            "batch_size (64) must be a multiple of num_generations (7)",
        ),
        (GRPOConfig, dict(critic="shared"), "grpo has no critic"),
        (GRPOConfig, dict(baseline="none"), "baseline is read by reinforce, not by grpo"),
        (GRPOConfig, dict(whiten_rewards=True), "whiten_rewards is read by"),
        (GRPOConfig, dict(algorithm="gspo", dual_clip=2.0), "dual_clip is read by ppo, rloo"),
        (GRPOConfig, dict(overlong_share=0.1, stop_token=None), "overlong_share needs stop_token"),
        (GRPOConfig, dict(kl_controller="adaptive"), "kl_coef, which must be above 0"),
        (GRPOConfig, dict(algorithm="cispo", cliprange=1.5), "cliprange must be below 1"),
        (PPOConfig, dict(critic=None), "ppo needs a critic"),
        (PPOConfig, dict(dynamic_sampling=2), "dynamic_sampling replaces groups, and ppo has none"),
        (PPOConfig, dict(old_kl_coef=2.0), "old_kl_coef is read by ppo_kl, not by ppo"),
        (PPOConfig, dict(algorithm="ppo_kl", num_ppo_epochs=1), "num_mini_batches to 2 or more"),
        (
            GRPOConfig, dict(old_logprobs="sampled", engine="vllm"),
            "set engine to fastrlhf or old_logprobs to scored",
        ),
        (PPOConfig, dict(dual_clip=0.9), "dual_clip must be above 1"),
        (PPOConfig, dict(kl_controller="adaptive", kl_target=0.0), "kl_target must be above 0"),
        (PPOConfig, dict(target_kl=-1.0), "target_kl must be above 0, or null"),
        (PPOConfig, dict(cliprange_value=0.0), "cliprange_value must be above 0, or null"),
        (ReinforceConfig, dict(num_ppo_epochs=2), "reinforce has no ratio"),
        (ReinforceConfig, dict(critic="shared"), "reinforce has no critic"),
        (ReinforceConfig, dict(baseline="value", critic=None), "reinforce needs a critic"),
        (ReinforceConfig, dict(baseline_decay=1.0), "baseline_decay must be at least 0 and below"),
    ],
)  # fmt: skip
def test_contradictions(kind, settings, message):
    with pytest.raises(UserError) as error:
        kind(**settings)
    assert message in str(error.value)


def test_a_run_of_any_algorithm_comes_back_from_its_yaml(tmp_path):
    for verb, kind in CONFIGS.items():
        for name in kind.family:
            config = kind(algorithm=name)
            (tmp_path / "c.yaml").write_text(config.to_yaml())
            assert load_config(str(tmp_path / "c.yaml"), kind=kind) == config, verb


def test_the_names_are_exported():
    for verb in CONFIGS:
        kind, trainer = CONFIGS[verb], TRAINERS[verb]
        assert getattr(fastrlhf, kind.__name__) is kind
        assert getattr(fastrlhf, trainer.__name__) is trainer
        assert trainer.config_class is kind


def test_a_trainer_takes_its_own_configuration():
    with pytest.raises(UserError, match="GRPOTrainer takes a GRPOConfig, not a PPOConfig"):
        GRPOTrainer(args=PPOConfig())


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_verb_trains(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text("\n".join(f'{{"prompt": "{a}"}}' for a in "abcdefgh"))
    (tmp_path / "mine.py").write_text(
        "def e(completions, **_):\n    return [c.count('e') / 4 for c in completions]\n"
    )
    words = "model=model dataset=p.jsonl reward=mine.py:e total_episodes=8 batch_size=8"
    words += " response_length=4 train_layers=2 eval_prompts=2"
    assert main([verb, *words.split()]) == 0, capsys.readouterr().err
    metrics = (tmp_path / f"runs/{verb}/metrics.jsonl").read_text()
    has_critic = verb in ("ppo", "a2c")
    for name in ("loss/value", "val/clipfrac", "val/explained_variance"):
        assert (name in metrics) == has_critic
    assert "check/first_ratio" in metrics


def test_verbs_show_their_own_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["grpo", "--help"])
    shown = capsys.readouterr().out
    assert "  num_generations = 8" in shown and "  algorithm = 'grpo'" in shown
    assert "  kl_coef = 0.0" in shown


def test_a_critic_is_asked_for_where_one_is_needed(tmp_path):
    from fastrlhf.backbone import SharedBackbone

    torch.manual_seed(0)
    bare = SharedBackbone(tiny.model(), train_layers=2, critic=None)
    config = ReinforceConfig(baseline="value", output_dir=str(tmp_path / "r"))
    rows = [{"prompt": "a"}] * 4
    with pytest.raises(UserError, match="reinforce needs a backbone with a critic"):
        PPOTrainer(bare, lambda completions, **_: [0.0] * len(completions), config, rows,
                   processing_class=tiny.tokenizer())  # fmt: skip
