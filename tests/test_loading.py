"""A run's settings reach the backbone that is loaded for it, and the plan of it."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_modes import make_adapter

from fastrlhf.cli import main
from fastrlhf.config import PPOConfig
from fastrlhf.errors import UserError
from fastrlhf.loading import load_backbone
from fastrlhf.memory import plan
from fastrlhf.pretrained import find_pretrained

CONFIG = PPOConfig(
    batch_size=4, total_episodes=4, response_length=4, train_layers=2, num_ppo_epochs=1,
    eval_prompts=4, num_samples=0, reward="sentiment",
)  # fmt: skip


@pytest.fixture
def places(tmp_path):
    """A model's folder, and that of an adapter on it."""
    return tiny.folder(tmp_path / "model"), make_adapter(tmp_path / "adapter", tiny.model())


def test_policy_and_reference_start_from_the_adapter_of_the_settings(places):
    model, adapter = places
    backbone = load_backbone(
        find_pretrained(str(model)), replace(CONFIG, adapter=str(adapter)), "cpu"
    )
    assert backbone.roles["reference"] == ("reference",)
    held = dict(backbone.named_parameters())
    for key, weight in load_file(adapter / "adapter_model.safetensors").items():
        inner = key.removeprefix("base_model.model.").removesuffix(".weight")
        for name, trains in (("default", True), ("reference", False)):
            (found,) = (p for k, p in held.items() if k.endswith(f"{inner}.{name}.weight"))
            assert torch.equal(found, weight) and found.requires_grad == trains


def test_the_plan_has_both_adapters_in_it(places):
    model, adapter = places
    given = {"model_config": tiny.config(), "prompt_length": 4}
    config = replace(CONFIG, adapter=str(adapter))
    loaded = load_backbone(find_pretrained(str(model)), config, "cpu")
    held = sum(p.numel() * 4 for k, p in loaded.named_parameters() if "lora_" in k)
    assert plan(config, **given).components["adapters"] == held
    assert plan(CONFIG, **given).components["adapters"] != held


def test_an_adapter_needs_lora():
    with pytest.raises(UserError, match="set use_peft: true or adapter: null"):
        PPOConfig(adapter="somewhere", use_peft=False)


def test_a_run_from_the_command_line_starts_from_an_adapter(places, tmp_path, capsys):
    model, adapter = places
    rows = [{"prompt": text} for text in ("abc", "bcd", "cde", "def", "efg", "fgh", "ghi", "hij")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def count(completions, **_):\n    return [float(len(c)) for c in completions]"
    )
    words = [
        f"model={model}", f"dataset={data}", f"reward={reward}:count", "batch_size=4",
        "total_episodes=4", "response_length=4", "train_layers=2", "eval_prompts=4",
        f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(["ppo", *words, f"adapter={adapter}"]) == 0
    saved = json.loads((tmp_path / "run/checkpoints/final/adapter_config.json").read_text())
    assert saved["r"] == 3
    assert main(["ppo", *words, f"adapter={tmp_path}", "output_dir=null"]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
