"""Reward models on disk and on a policy's backbone: one score, whoever computes it."""

import json
import shutil

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastrlhf import PPOConfig, PPOTrainer
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.errors import UserError
from fastrlhf.rewards.functions import load_objectives
from fastrlhf.rewards.model import (
    RewardModel,
    fingerprint,
    is_reward_model,
    same_base,
    save_reward_model,
)

PROMPTS, COMPLETIONS = ["the film ", "a ", "so "], ["was good", "bad", "long and dull"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base):
    torch.manual_seed(0)
    backbone = SharedBackbone.from_pretrained(
        str(base), lora=LoraSettings(4, 8), train_layers=2, critic=None, reward=True,
        reference=False,
    )  # fmt: skip
    for parameter in backbone.role_parameters("reward"):
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


@pytest.fixture(scope="module")
def folder(base, trained, tmp_path_factory):
    return save_reward_model(trained, tmp_path_factory.mktemp("saved"), str(base), {"gap": 0.1})


@pytest.fixture(scope="module")
def scores(trained):
    return RewardModel(trained)(PROMPTS, COMPLETIONS)


def test_the_folder_gives_the_same_scores(folder, scores):
    assert is_reward_model(folder)
    assert json.loads((folder / "reward.json").read_text())["gap"] == 0.1
    assert RewardModel.from_pretrained(folder)(PROMPTS, COMPLETIONS) == pytest.approx(
        scores, rel=1e-4
    )
    assert max(scores) - min(scores) > 0.1


def test_transformers_loads_it_as_a_classifier(folder, scores):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    given = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits[:, 0]
    bias = json.loads((folder / "reward.json").read_text())["bias"]
    assert (logits + bias).tolist() == pytest.approx(scores, rel=1e-4, abs=1e-5)


def policy(base, **settings):
    given = {"train_layers": 2, "critic": "shared"} | settings
    return SharedBackbone.from_pretrained(str(base), **given)


def test_a_policy_shares_its_backbone(base, folder, scores):
    backbone = policy(base)
    trains = {id(p) for p in backbone.trainable()}
    for parameter in backbone.trainable():
        torch.nn.init.normal_(parameter, std=0.2)
    reward = RewardModel.from_pretrained(folder)
    reward.share(backbone, backbone.tokenizer)
    assert reward.backbone is backbone
    # Whatever the policy has become, the reward is computed on the base.
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(scores, rel=1e-4)
    assert {id(p) for p in backbone.trainable()} == trains


def test_another_base_is_named(tmp_path, folder):
    other = tmp_path / "other"
    tiny.model(seed=1).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    with pytest.raises(UserError, match=r"was trained on .*, not on .*reward_backbone: own"):
        RewardModel.from_pretrained(folder).share(policy(other), tiny.tokenizer())


@pytest.mark.parametrize("place", ["layers.0", "layers.3", "embed_tokens", "model.norm"])
def test_a_base_that_differs_anywhere_is_another(base, folder, place):
    """In the layers with adapters and below, in the last rows of the embedding, in a norm."""
    backbone = policy(base)
    with torch.no_grad():
        for name, p in backbone.model.named_parameters():
            if place in name and "lora_" not in name:
                part = p[-8:] if "embed" in name else p
                part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(UserError, match="was trained on"):
        RewardModel.from_pretrained(folder).share(backbone, backbone.tokenizer)


def test_the_same_base_has_the_same_fingerprint(base, trained):
    """Whatever adapters it has, in either precision, and whatever has been trained on it."""
    expected = fingerprint(trained)
    other = policy(base, train_layers=1, dtype=torch.bfloat16)
    assert fingerprint(other) == expected and None not in expected.values()
    for settings in ({"train_layers": 2}, {"train_layers": "all"}):
        full = policy(base, lora=None, **settings)
        with torch.no_grad():
            for p in full.trainable():
                p.add_(1)
        assert fingerprint(full) == expected
    # Quantised matrices cannot be told from others; the rest can.
    quantized = expected | {"matrices": None}
    assert same_base(quantized, expected) and same_base(expected, quantized)
    assert not same_base(quantized, expected | {"rest": "other"})
    assert not same_base(expected, "a digest of the first rows alone")


def test_a_reward_model_with_a_backbone_keeps_it(base, trained, scores, tmp_path):
    reward = RewardModel(trained)
    settings = {
        "model": str(base), "total_episodes": 4, "batch_size": 4, "num_ppo_epochs": 1,
        "response_length": 4, "train_layers": 2, "eval_prompts": 2, "stop_token": None,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    rows = [{"prompt": text} for text in ("a film", "the end", "so it", "we saw", "if only")]
    trainer = PPOTrainer(reward_funcs=reward, args=PPOConfig(**settings), train_dataset=rows)
    trainer.train()
    assert reward.backbone is trained and trainer.backbone is not trained
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(scores, rel=1e-4)


def test_one_reward_model_shares_and_a_second_is_told_so(base, folder):
    backbone = policy(base)
    first, second = (RewardModel.from_pretrained(folder) for _ in range(2))
    first.share(backbone, backbone.tokenizer)
    with pytest.raises(UserError, match=r"shares the policy's backbone already.*reward_backbone"):
        second.share(backbone, backbone.tokenizer)
    assert second.backbone is None


def test_rewards_are_called_by_their_runs(base, folder, tmp_path, monkeypatch):
    for name in ("kind", "short"):
        shutil.copytree(folder, tmp_path / "runs" / name / "model")
    monkeypatch.chdir(tmp_path)
    found = load_objectives(["runs/kind/model", "runs/short/model"])
    assert [x.name for x in found] == ["kind", "short"]
    assert [x.function.__name__ for x in found] == ["kind", "short"]
    assert [x.name for x in load_objectives("runs/kind")] == ["kind"]
    monkeypatch.chdir("runs/kind")
    assert load_objectives("./model")[0].name == "kind"


def test_a_policy_that_cannot_share(base, folder):
    with pytest.raises(UserError, match="below the trained ones; set train_layers to 2"):
        RewardModel.from_pretrained(folder).share(policy(base, train_layers=1), None)
    with pytest.raises(UserError, match="use_peft: true"):
        RewardModel.from_pretrained(folder).share(policy(base, lora=None), None)


def test_half_a_folder(folder, tmp_path):
    (tmp_path / "reward.json").write_text((folder / "reward.json").read_text())
    with pytest.raises(UserError, match="cannot be read"):
        RewardModel.from_pretrained(tmp_path)
    assert not is_reward_model(tmp_path / "none")


def test_normalised_on_samples_of_ones_own(base, folder):
    reward = RewardModel.from_pretrained(folder)
    texts = [f"{a} {b}" for a in ("good", "bad", "so so") for b in ("film", "end", "cast")]
    reward.normalize(reward.scores(texts))
    found = reward.scores(texts)
    assert abs(float(found.mean())) < 1e-5 and abs(float(found.std()) - 1) < 1e-5
    with pytest.raises(UserError, match="same reward"):
        reward.normalize(torch.ones(3))


def test_a_run_rewards_with_a_role_of_its_policy(base, folder, tmp_path):
    settings = {
        "model": str(base), "reward": [str(folder), "repetition"], "reward_weights": [1.0, 0.5],
        "reward_normalization": "running", "reward_backbone": "shared", "total_episodes": 8,
        "batch_size": 4, "num_ppo_epochs": 1, "response_length": 4, "train_layers": 2,
        "eval_prompts": 2, "output_dir": str(tmp_path / "run"), "stop_token": None,
    }  # fmt: skip
    rows = [{"prompt": text} for text in ("a film", "the end", "so it", "we saw", "if only")]
    trainer = PPOTrainer(args=PPOConfig(**settings), train_dataset=rows)
    model = trainer.reward.objectives[0].function
    assert model.backbone is trainer.backbone
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    name = f"reward/{folder.name}"
    assert all({name, "reward/repetition"} <= line.keys() for line in lines)
    assert trainer.reward.state_dict()["moments"]["count"] == [8.0, 8.0]
