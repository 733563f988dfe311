"""The reward model's settings: refused when they cannot be, and all documented."""

import dataclasses
import inspect

import pytest
import yaml

from fastrlhf.config import describe_settings, load_config
from fastrlhf.errors import UserError
from fastrlhf.reward_config import RewardConfig
from fastrlhf.reward_settings import RewardSettings, check_reward


def test_settings_go_through_yaml(tmp_path):
    config = RewardConfig(train_layers="all", max_gap=0.1, learning_rate=3e-4)
    path = tmp_path / "mine.yaml"
    path.write_text(config.to_yaml())
    assert load_config(str(path), kind=RewardConfig) == config
    assert yaml.safe_load(config.to_yaml())["train_layers"] == "all"


def test_help_has_every_setting():
    text = describe_settings(RewardConfig)
    for field in dataclasses.fields(RewardConfig):
        assert f"  {field.name} = " in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"rating_gap": -1.0}, "rating_gap must not be negative"),
        ({"eval_rows": 0}, "eval_rows must be above 0, or null"),
        ({"train_layers": 0}, "train_layers"),
        ({"trunk_cache_mb": -1}, "trunk_cache_mb"),
        ({"bf16": "yes"}, "bf16: 'yes' does not fit"),
        ({"per_device_train_batch_size": 8}, "TRL's per_device_train_batch_size is 'batch_size"),
        ({"batchsize": 8}, "did you mean 'batch_size'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    pairs = [(k, yaml.safe_dump(v).removesuffix("...\n").strip()) for k, v in settings.items()]
    with pytest.raises(UserError, match=message):
        load_config(None, pairs, RewardConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": []}, "reward must name a reward"),
        ({"reward_weights": ["a"]}, "reward_weights"),
        ({"reward_bounds": [1, 0]}, "reward_bounds"),
        ({"reward_clip": 0.0}, "reward_clip"),
        ({"reward_timeout": 0.0}, "reward_timeout"),
        ({"reward_retries": -1}, "reward_retries"),
    ],
)
def test_rewards_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_reward(RewardSettings(**settings))
    assert next(iter(settings)) in inspect.getsource(RewardSettings)
