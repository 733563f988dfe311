"""A run of any mode leaves weights that load elsewhere and compute what the run computed."""

import warnings

import pytest
import tiny
import tiny_modes
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_modes import MASK, MODES, TOKENS, of_model, of_role, train
from transformers import AutoModelForCausalLM

from fastrlhf.backbone import SharedBackbone
from fastrlhf.checkpoint import save_weights


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_modes.Scene(tmp_path_factory.mktemp("models"))


def files(folder) -> set[str]:
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in found)
    return {name for name in found if name.endswith(".safetensors")}


def with_adapter(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(folder)).eval().get_base_model()


@pytest.mark.parametrize("name", ["lora_all", "lora_top", "int8", "nf4", "adapter"])
def test_adapters_load_with_peft(scene, name, tmp_path):
    mode = MODES[name]
    backbone = scene.backbone(mode, critic="adapter", reward=True)
    backbone.add_policy("other")
    train(backbone)
    train(backbone, lambda b: of_role(b, "other").square().sum())
    folder = save_weights(backbone, tmp_path / "checkpoints" / "final")
    kept = {"", "critic/", "reward/", "other/"} | ({"reference/"} if mode.adapter else set())
    heads = {"value_head.safetensors", "reward_head.safetensors"}
    assert files(folder) == {f"{k}adapter_model.safetensors" for k in kept} | heads
    assert not list((tmp_path / "checkpoints").glob(".*")), "temporary folders are left behind"
    untouched = tiny_modes.Mode({}, reference=mode.reference, split=mode.split)
    for role, where in (("policy", folder), ("other", folder / "other")):
        loaded = with_adapter(scene.untouched(untouched), where)
        torch.testing.assert_close(
            of_role(backbone, role), of_model(loaded, mode.split), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["hydra", "hydra_untied"])
def test_trained_layers_load_into_the_model(scene, name, tmp_path):
    mode = MODES[name]
    backbone = scene.backbone(mode, critic="adapter", reward=True)
    train(backbone)
    with backbone.role("reference"):
        folder = save_weights(backbone, tmp_path / "final")
    assert files(folder) == {
        "trained_layers.safetensors", "critic/adapter_model.safetensors",
        "reward/adapter_model.safetensors", "value_head.safetensors", "reward_head.safetensors",
    }  # fmt: skip
    model = scene.untouched(mode)
    state = load_file(folder / "trained_layers.safetensors")
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    assert {k.split("layers.")[1][0] for k in state if "layers." in k} == {"2", "3"}
    assert torch.equal(of_role(backbone, "policy"), of_model(model, mode.split))
    # The critic's adapter is on the untouched model.
    critic = with_adapter(scene.untouched(mode), folder / "critic").get_decoder()
    trunk = backbone.trunk(TOKENS, MASK)
    with torch.no_grad():
        theirs = critic(TOKENS[1:2], attention_mask=MASK[1:2]).last_hidden_state
        ours = backbone.hidden("critic", trunk, MASK)[1:2]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "full_untied", "full_nf4"])
def test_a_whole_model_loads_with_transformers(scene, name, tmp_path):
    backbone = scene.backbone(MODES[name])
    train(backbone)
    folder = save_weights(backbone, tmp_path / "final")
    assert files(folder) == {"model.safetensors", "value_head.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(of_role(backbone, "policy"), of_model(model, None))


def test_heads_are_saved_as_they_are(tmp_path):
    backbone = SharedBackbone(tiny.model(), train_layers=1, critic="shared", reward=True)
    with torch.no_grad():
        for head in (backbone.value_head, backbone.reward_head):
            head.linear.weight.normal_()
    folder = save_weights(backbone, tmp_path / "final")
    for name in ("value_head", "reward_head"):
        state = load_file(folder / f"{name}.safetensors")
        assert torch.equal(state["linear.weight"], getattr(backbone, name).linear.weight)


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    backbone = SharedBackbone(tiny.model(), train_layers=1)
    folder = save_weights(backbone, tmp_path / "final")
    before = (folder / "adapter_model.safetensors").read_bytes()
    train(backbone)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fastrlhf.checkpoint.replace_folder", stop)
        save_weights(backbone, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
