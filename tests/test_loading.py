"""A run's settings reach the backbone that is loaded for it, and the plan of it."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from tiny_modes import make_adapter
from transformers import BitsAndBytesConfig

from fastrlhf.cli import main
from fastrlhf.config import PPOConfig
from fastrlhf.configs import GRPOConfig
from fastrlhf.errors import UserError
from fastrlhf.loading import load_backbone, refuse_tf32, with_library_configs
from fastrlhf.memory import plan
from fastrlhf.pretrained import find_pretrained
from fastrlhf.quantization import is_quantized
from fastrlhf.trainers import GRPOTrainer

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


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("names", [None, "all-linear", LINEAR])
def test_a_lora_config_sets_rank_and_alpha_alone(names, places):
    asked = LoraConfig(r=5, lora_alpha=7, target_modules=names, task_type="CAUSAL_LM")
    found = with_library_configs(CONFIG, str(places[0]), asked)
    assert found == replace(CONFIG, lora_rank=5, lora_alpha=7.0)
    # Of another algorithm's settings, whose defaults are its own, nothing else changes either.
    group = GRPOConfig(algorithm="dapo", batch_size=8, total_episodes=8)
    assert with_library_configs(group, None, LoraConfig(r=5)).lora_rank == 5
    assert replace(with_library_configs(group, None, LoraConfig(r=16)), lora_alpha=32.0) == group


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (LoraConfig(lora_dropout=0.1), "lora_dropout=0.1 is not supported; leave lora_dropout out"),
        (LoraConfig(bias="all"), "bias='all' is not supported"),
        (LoraConfig(use_rslora=True), "use_rslora=True is not supported"),
        (LoraConfig(target_modules=LINEAR[:2]), "adapters are on all of down_proj, .*on others"),
        (LoraConfig(target_modules=LINEAR, layers_to_transform=[1]), "out and set train_layers"),
        (IA3Config(), "is a IA3Config; give a peft.LoraConfig"),
    ],
)
def test_what_our_adapters_do_not_take_is_named(asked, message, places):
    with pytest.raises(UserError, match=message):
        with_library_configs(CONFIG, str(places[0]), asked)


@pytest.mark.parametrize("settings", [{"use_peft": False}, {"adapter": "somewhere"}])
def test_a_lora_config_beside_settings_that_say_otherwise(settings):
    with pytest.raises(UserError, match="leave peft_config out"):
        with_library_configs(replace(CONFIG, **settings), None, LoraConfig())


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("int8", "int8"),
        ("nf4", "nf4"),
        (BitsAndBytesConfig(load_in_8bit=True), "int8"),
        (BitsAndBytesConfig(**NF4), "nf4"),
        (BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True), "nf4"),
        (BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16), "nf4"),
    ],
)
def test_a_quantization_config_is_the_setting(asked, kind):
    config = replace(CONFIG, bf16=True)
    given = {"quantization_config": asked}
    assert with_library_configs(config, **given) == replace(config, quantization=kind)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("int4", "quantization: 'int4' does not fit"),
        (BitsAndBytesConfig(), "quantises nothing"),
        (BitsAndBytesConfig(load_in_4bit=True), "'fp4' is not supported; set it to 'nf4'"),
        (BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype="float16"), "computes in float32"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0), "llm_int8_threshold=3.0"),
        (8, "is a int; give a transformers.BitsAndBytesConfig"),
    ],
)
def test_a_quantisation_that_is_not_ours_is_named(asked, message):
    with pytest.raises(UserError, match=message):
        with_library_configs(CONFIG, quantization_config=asked)


def test_a_quantization_config_beside_another_setting():
    with pytest.raises(UserError, match="is int8 and quantization nf4; leave one"):
        with_library_configs(replace(CONFIG, quantization="nf4"), quantization_config="int8")
    with pytest.raises(UserError, match="only adapters train on quantised weights"):
        with_library_configs(replace(CONFIG, use_peft=False), quantization_config="int8")


def test_a_trainer_takes_both_and_a_backbone_neither(places, tmp_path):
    rows = [{"prompt": text} for text in ("abc", "bcd", "cde", "def", "efg", "fgh", "ghi", "hij")]
    settings = GRPOConfig(
        batch_size=4, total_episodes=4, response_length=4, train_layers=2, eval_prompts=4,
        num_generations=2, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    given = {
        "reward_funcs": lambda completions, **_: [0.0] * len(completions), "args": settings,
        "train_dataset": rows, "peft_config": LoraConfig(r=5, lora_alpha=7),
    }  # fmt: skip
    trainer = GRPOTrainer(str(places[0]), **given, quantization_config="int8")
    assert trainer.config == replace(settings, lora_rank=5, lora_alpha=7.0, quantization="int8")
    (shape,) = {p.shape for k, p in trainer.backbone.named_parameters() if "q_proj.lora_A" in k}
    assert shape == (5, 32) and is_quantized(trainer.backbone.model)
    with pytest.raises(UserError, match="has its adapters and its weights already"):
        GRPOTrainer(trainer.backbone, **given)


def test_a_process_that_rounds_float32_to_tf32_is_told_before_the_run():
    refuse_tf32("cuda", torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        refuse_tf32("cpu", torch.float32)
        refuse_tf32("cuda", torch.bfloat16)
        with pytest.raises(UserError, match=r"set_float32_matmul_precision\('highest'\)"):
            refuse_tf32("cuda:1", torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    refuse_tf32("cuda", torch.float32)
