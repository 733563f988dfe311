"""Modes by name, by mapping and by file; prompts that carry an instruction; what is refused."""

import pytest
import yaml

from fastrlhf import HierarchicalConfig, UserError, load_config
from fastrlhf.modes import MODES, read_modes, with_instruction


def test_names_mappings_and_files_give_instructions_in_their_order(tmp_path):
    assert read_modes(["creative", "concise"]) == {
        name: MODES[name] for name in ("creative", "concise")
    }
    assert list(read_modes(["creative", "concise"])) == ["creative", "concise"]
    own = {"b": "Be brief.", "a": "", "c": "Rhyme."}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    read = read_modes(str(tmp_path / "own.yaml"))
    assert read == own and list(read) == ["b", "a", "c"]
    (tmp_path / "names.yaml").write_text("[concise, creative]")
    assert list(read_modes(str(tmp_path / "names.yaml"))) == ["concise", "creative"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "modes is empty; give at least one"),
        ({}, "modes is empty"),
        (["consise"], "'consise' is no mode that ships; did you mean 'concise'"),
        (["concise", "creative", "concise"], "'concise' is there twice"),
        ({"in two words": "x"}, "'in two words' cannot be a name"),
        ({"a": 3}, "the mode 'a' has 3 for its instruction"),
        ({"a": "x", "b": "x"}, "the modes 'a' and 'b' have the same instruction"),
        ("nowhere.yaml", r"there is no file 'nowhere\.yaml'"),
    ],
)
def test_modes_that_cannot_be_are_named(given, message):
    with pytest.raises(UserError, match=message):
        HierarchicalConfig(modes=given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: x\nb: y\na: z", "'a' is there twice"),
        ("just a text", "must hold `name: instruction` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_files_that_cannot_be_are_named(tmp_path, text, message):
    (tmp_path / "modes.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_modes(str(tmp_path / "modes.yaml"))


def test_an_instruction_precedes_text_and_follows_the_last_users_message():
    assert with_instruction("The film", "Be brief.") == "Be brief. The film"
    assert with_instruction("Q: 3+4", "Q: 1+1\nA: 2\n") == "Q: 1+1\nA: 2\nQ: 3+4"
    user, answer = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello"}
    told = with_instruction([user, answer, user, answer], "Be brief.")
    assert told == [user, answer, {"role": "user", "content": "Hi. Be brief."}, answer]
    assert user["content"] == "Hi."
    assert with_instruction([user], "") == [user] and with_instruction("x", "") == "x"
    with pytest.raises(UserError, match="no user's message of text"):
        with_instruction([answer], "Be brief.")


def test_the_configuration_keeps_the_instructions_themselves(tmp_path):
    (tmp_path / "own.yaml").write_text("b: Be brief.\na: Rhyme.")
    config = HierarchicalConfig(modes=str(tmp_path / "own.yaml"))
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    (tmp_path / "own.yaml").unlink()
    again = load_config(str(tmp_path / "run.yaml"), (), HierarchicalConfig)
    assert again == config and list(again.modes) == ["b", "a"]
    assert list(HierarchicalConfig().modes) == ["concise", "informative", "creative"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode_learning_rate": -1.0}, "mode_learning_rate must not be negative"),
        ({"mode_entropy_coef": -1.0}, "mode_entropy_coef must not be negative"),
        ({"kl_coef": 0.0, "use_peft": False}, "set kl_coef above 0 or use_peft: true"),
        ({"algorithm": "grpo"}, "it must be ppo or ppo_kl"),
    ],
)
def test_settings_that_exclude_each_other(changes, message):
    with pytest.raises(UserError, match=message):
        HierarchicalConfig(**changes)
