"""Classifiers of transformers as rewards: which logit, whatever is padded, and what is refused."""

import sys
import warnings

import pytest
import tiny
import torch
from transformers import (
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fastrlhf.errors import UserError
from fastrlhf.rewards.classifier import ClassifierReward, load_classifier
from fastrlhf.rewards.functions import RewardScorer, load_objectives


def folder(path, labels):
    torch.manual_seed(0)
    config = tiny.config(num_labels=len(labels), id2label=dict(enumerate(labels)))
    LlamaForSequenceClassification(config).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def test_one_output_is_the_score(tmp_path):
    reward = load_classifier(folder(tmp_path / "judge", ["score"]))
    assert isinstance(reward, ClassifierReward)
    completions = ["good", "a much longer text"]
    together = reward(prompts=["the ", "the "], completions=completions)
    alone = [reward(prompts=["the "], completions=[x])[0] for x in completions]
    assert together == pytest.approx(alone, rel=1e-4)
    given = tiny.tokenizer()("the good", return_tensors="pt")
    assert together[0] == pytest.approx(float(reward.model(**given).logits), rel=1e-4)


def test_of_several_labels_one_is_chosen(tmp_path):
    name = folder(tmp_path / "judge", ["BAD", "FINE", "GOOD"])
    texts = {"prompts": ["a ", "b "], "completions": ["c", "dd"]}
    each = [load_classifier(f"{name}#{label}")(**texts) for label in ("BAD", "FINE", "GOOD")]
    total = torch.tensor(each).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2))
    with pytest.raises(UserError, match="has the labels BAD, FINE, GOOD; choose one"):
        load_classifier(name)
    with pytest.raises(UserError, match="has no label 'GOODE'; did you mean 'GOOD'"):
        load_classifier(f"{name}#GOODE")


def test_a_folder_is_a_reward_by_its_path(tmp_path):
    (objective,) = load_objectives(folder(tmp_path / "judge", ["score"]))
    assert objective.name == "judge"
    scores = RewardScorer(objective.function).judge(["a"], ["b"], [[1]], [])
    assert len(scores) == 1 and scores[0] is not None


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"cannot be loaded .*give a folder that `fastrlhf reward`"):
        load_classifier(str(tmp_path))


def test_of_a_text_that_is_too_long_the_end_is_judged(tmp_path):
    reward = load_classifier(folder(tmp_path / "judge", ["score"]))
    longest = tiny.config().max_position_embeddings
    assert reward.longest == longest
    with pytest.warns(UserWarning, match=rf"reads {longest} tokens, and a text has {longest + 5}"):
        cut = reward(prompts=["a" * longest], completions=["b" * 5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        other = reward(prompts=["a" * longest], completions=["c" * 5])
        whole = reward(prompts=["a" * (longest - 5)], completions=["b" * 5])
    assert cut == pytest.approx(whole, rel=1e-4) and cut != pytest.approx(other, rel=1e-4)


def test_a_text_that_just_fits_is_no_warning(tmp_path):
    reward = load_classifier(folder(tmp_path / "judge", ["score"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(prompts=["a" * 60], completions=["bcde"])


def test_positions_that_begin_behind_padding():
    config = RobertaConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=20, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = int(1e30)
    reward = ClassifierReward(RobertaForSequenceClassification(config).eval(), tokenizer)
    assert reward.longest == 18
    with pytest.warns(UserWarning):
        assert len(reward(prompts=["a" * 30], completions=["b"])) == 1


def test_a_model_that_does_not_say_its_length(tmp_path):
    reward = load_classifier(folder(tmp_path / "judge", ["score"]))
    unknown = ClassifierReward(reward.model, reward.tokenizer)
    unknown.longest = sys.maxsize
    texts = {"prompts": ["a "], "completions": ["b"]}
    assert unknown(**texts) == reward(**texts)
