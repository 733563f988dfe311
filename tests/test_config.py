"""Settings are refused where they are made, with the nearest key or the identity that fails."""

import dataclasses
import inspect

import numpy as np
import pytest
import yaml

from fastrlhf.algorithm_settings import AlgorithmSettings
from fastrlhf.config import RECIPES, PPOConfig, describe_settings, load_config
from fastrlhf.errors import UserError
from fastrlhf.reward_settings import RewardSettings
from fastrlhf.rollout_settings import RolloutSettings
from fastrlhf.run_settings import RunSettings


def test_every_recipe_loads():
    recipes = list(RECIPES.glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_config(recipe.stem)


def test_yaml_round_trip(tmp_path):
    config = load_config("sentiment", [("learning_rate", "3e-4"), ("train_layers", "all")])
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "c.yaml")) == config


def test_numbers_of_a_sweep_become_pythons_own():
    sweep = PPOConfig(
        learning_rate=np.float64(1e-4),
        temperature=np.float32(0.5),
        batch_size=np.int64(32),
        bf16=np.bool_(True),
        kl_estimator=np.str_("k1"),
        reward_bounds=list(np.array([-1.0, 1.0])),
        reward_weights=np.array([1, 2]),
    )
    assert yaml.safe_load(sweep.to_yaml()) == dataclasses.asdict(sweep)
    assert type(sweep.learning_rate) is float and sweep.learning_rate == 1e-4
    assert type(sweep.batch_size) is int and sweep.bf16 is True
    assert list(map(type, sweep.reward_bounds)) == [float] * 2
    assert sweep.reward_weights == [1, 2]


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", np.float64(32)), ("batch_size", True), ("bf16", np.int64(1))]
)
def test_a_number_of_another_kind_is_still_refused(name, value):
    with pytest.raises(UserError, match=f"{name}: .* does not fit"):
        PPOConfig(**{name: value})


def test_overrides_win_and_are_read_as_values():
    config = load_config("sentiment", [("learning_rate", "1e-5"), ("stop_token", "null")])
    assert config.learning_rate == 1e-5
    assert config.stop_token is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kl_coff", "1", "did you mean 'kl_coef'"),
        ("learning_rate", "fast", "learning_rate: 'fast' does not fit; it must be float"),
        ("learning_rate", "-1", "above 0"),
        ("learning_rate", ".nan", "does not fit"),
        ("batch_size", "1.5", "must be int"),
        ("batch_size", "0", "at least 1"),
        ("total_episodes", "100", "total_episodes (100) must be a multiple of batch_size (64)"),
        ("num_mini_batches", "7", "batch_size (64) must be a multiple of num_mini_batches (7)"),
        ("kl_estimator", "k4", "'exact' or 'k1' or 'k2' or 'k3'"),
        ("audit", "2", "must be bool"),
        ("model", "3", "must be str"),
        ("cliprange", "1.0", "below 1"),
        ("train_layers", "0", "at least 1"),
        ("train_layers", "some", "must be int or 'all'"),
    ],
)
def test_bad_settings(key, value, message):
    with pytest.raises(UserError) as error:
        load_config("sentiment", [(key, value)])
    assert message in str(error.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'sentiment'"):
        load_config("sentimant")


def test_a_recipe_that_is_not_a_mapping(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="must hold `key: value` lines"):
        load_config(str(path))
    path.write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        load_config(str(path))


def test_every_field_has_a_docstring():
    kinds = (AlgorithmSettings, PPOConfig, RewardSettings, RolloutSettings, RunSettings)
    source = "".join(map(inspect.getsource, kinds))
    for field in dataclasses.fields(PPOConfig):
        after = source.split(f"    {field.name}: ")[1].split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), field.name


def test_help_describes_every_setting():
    text = describe_settings()
    for field in dataclasses.fields(PPOConfig):
        assert f"  {field.name} = " in text
    assert "Weight of the KL to the reference." in text


def test_missing_eos_penalty_needs_a_stop_token():
    with pytest.raises(UserError, match="stop_token"):
        PPOConfig(stop_token=None, missing_eos_penalty=1.0)
