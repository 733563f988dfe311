"""An adapter is taken only where it fits, and the error says what it fits instead."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_modes import make_adapter

from fastrlhf.adapter_file import AdapterFile
from fastrlhf.backbone import SharedBackbone
from fastrlhf.errors import UserError


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(folder, model=None, first_layer=0) -> str:
    with pytest.raises(UserError) as error:
        AdapterFile.read(folder, model or tiny.model(), first_layer)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path / "adapter", tiny.model())


def test_one_that_fits_is_read_and_changes_nothing(adapter):
    model = tiny.model()
    names = [name for name, _ in model.named_modules()]
    file = AdapterFile.read(adapter, model, 2)
    assert file.config.r == 3 and len(file.state) == 2 * 2 * 2
    assert [name for name, _ in model.named_modules()] == names


def test_one_for_another_width(adapter):
    change(adapter, base_model_name_or_path="someone/small")
    message = refused(adapter, tiny.model(hidden_size=64))
    assert "made for someone/small, not for this llama model" in message
    assert " is 64 to 64 wide, and lora_A is 3 × 32; give one" in message


def test_one_for_a_deeper_model(adapter):
    assert "the model has no model.layers.2" in refused(adapter, tiny.model(num_hidden_layers=2))


def test_one_for_another_name(adapter):
    change(adapter, base_model_name_or_path="someone/small")
    model = tiny.model()
    model.config._name_or_path = "someone/large"
    with pytest.warns(UserWarning, match="made for someone/small, and this is someone/large"):
        AdapterFile.read(adapter, model, 0)
    for same in ("mirror/Small", "/a/folder/of/any/name", ""):
        model.config._name_or_path = same
        AdapterFile.read(adapter, model, 0)


def test_one_below_the_trained_layers(adapter):
    assert "set train_layers to 2 or 'all'" in refused(adapter, first_layer=3)


def test_no_adapter(tmp_path, adapter):
    assert "no adapter_config.json" in refused(tmp_path / "nothing")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "no adapter_model.safetensors" in refused(adapter)


def test_files_that_cannot_be_read(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"\x08")
    assert "cannot be read" in refused(adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "cannot be read" in refused(adapter)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_other_kinds(adapter, settings, named):
    change(adapter, **settings)
    message = refused(adapter)
    assert named in message


@pytest.mark.parametrize("settings", [{"r": 5}, {"rank_pattern": {"up_proj": 5}}])
def test_weights_of_another_rank(adapter, settings):
    change(adapter, **settings)
    model = tiny.model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError, match=r"has rank 3, and its .* says 5; save it again"):
        SharedBackbone(model, adapter=adapter)
    assert [name for name, _ in model.named_modules()] == names


def test_ranks_that_differ_between_layers(tmp_path):
    folder = make_adapter(tmp_path / "a", tiny.model(), rank_pattern={"up_proj": 5})
    SharedBackbone(tiny.model(), adapter=folder)


def test_weights_that_the_settings_do_not_name(adapter):
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "up_proj" not in k}, path)
    with pytest.raises(UserError, match="not whole"):
        SharedBackbone(tiny.model(), adapter=adapter)
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file(state | {key: torch.zeros(3, 28)}, path)
    assert "it has a weight" in refused(adapter)
