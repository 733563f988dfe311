"""The plan says what is really held, and what cannot fit is refused."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms import ALGORITHMS
from fastrlhf.architectures import architecture, shipped
from fastrlhf.cli import main
from fastrlhf.config import PPOConfig
from fastrlhf.configs import CONFIGS, GRPOConfig
from fastrlhf.errors import UserError
from fastrlhf.memory import parse_size, plan, planned_and_measured, size
from fastrlhf.memory_advice import AUTOMATIC, batch_sizes
from fastrlhf.memory_shapes import int8, nf4
from fastrlhf.memory_simulation import Simulation, optimizer_bytes
from fastrlhf.memory_tracking import StorageTracker, head_workspace, passes, tensor_bytes
from fastrlhf.optim import make_optimizer
from fastrlhf_kernels import PolicyLossSpec, linear_policy_loss
from fastrlhf_kernels._head import ChunkedHead

MILLIONS = {
    "Qwen2.5-0.5B": 494.03, "Qwen2.5-1.5B": 1543.7, "Qwen2.5-3B": 3085.9, "Qwen2.5-7B": 7615.6,
    "Qwen3-0.6B": 596.05, "Qwen3-1.7B": 1720.6, "Qwen3-4B": 4022.5, "Qwen3-8B": 8190.7,
    "Llama-3.2-1B": 1235.8, "Llama-3.2-3B": 3212.7, "Llama-3.1-8B": 8030.3,
    "SmolLM2-135M": 134.5, "SmolLM2-360M": 361.8, "SmolLM2-1.7B": 1711.4,
    "Gemma-2-2B": 2614.3, "Gemma-3-1B": 999.9,
}  # fmt: skip
SETTINGS = dict(
    batch_size=8, total_episodes=8, response_length=8, train_layers=2, microbatch_tokens=64,
    eval_prompts=4, workspace_mb=1,
)  # fmt: skip
CONFIG = PPOConfig(**SETTINGS)
PROMPT = 6
MODES = {
    "lora": {},
    "lora all": {"train_layers": "all"},
    "critic adapter": {"critic": "adapter"},
    "hydra": {"use_peft": False},
    "full": {"use_peft": False, "train_layers": "all"},
    "no reference": {"use_peft": False, "train_layers": "all", "kl_coef": 0.0},
    "packed": {"microbatching": "packed"},
    "in order": {"microbatching": "in_order", "trunk_cache": False},
    "checkpointing": {"gradient_checkpointing": True},
    "torch": {"optim": "adamw_torch"},
}


def simulation(config, device="meta"):
    made = Simulation(config, tiny.config(), "cpu", PROMPT, device=device)
    return made, made.run()


def test_every_shipped_shape_has_the_published_number_of_parameters():
    assert set(shipped()) == set(MILLIONS)
    for name, published in MILLIONS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture(name))
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert count == pytest.approx(published, abs=0.06), name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_plan(name, monkeypatch):
    """With a critic and without, in groups or not: as the same steps with data."""
    (kind,) = [kind for kind in CONFIGS.values() if name in kind.family]
    config = kind(algorithm=name, **SETTINGS, kl_coef=0.1)
    _, planned = simulation(config)
    monkeypatch.setattr(torch.Tensor, "isfinite", passes)
    _, real = simulation(config, device="cpu")
    for phase, peak in real.peaks.items():
        assert planned.peaks[phase] == pytest.approx(peak, rel=0.05), phase
    assert (planned.components["value head"] > 0) == (config.critic is not None)


def test_a_smaller_batch_holds_whole_groups():
    config = GRPOConfig(batch_size=48, total_episodes=48, num_generations=8, num_mini_batches=3)
    assert batch_sizes(config) == [24]


def test_names_of_the_hub_and_paths_find_their_shape(tmp_path):
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"):
        assert architecture(name).hidden_size == 896
    assert architecture("meta-llama/Meta-Llama-3.1-8B-Instruct").intermediate_size == 14336
    assert architecture("google/gemma-2-2b-it").model_type == "gemma2"
    tiny.config().save_pretrained(tmp_path)
    assert architecture(str(tmp_path)).hidden_size == 32
    assert architecture(str(tmp_path / "config.json")).num_hidden_layers == 4
    with pytest.raises(UserError, match=r"give the path of its config.json.*Qwen3-8B"):
        architecture("qwen3-8c")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a model's config\.json"):
        architecture(str(tmp_path))


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_without_data_is_that_of_the_same_steps_with_data(mode, monkeypatch):
    """The peak of every phase; what a number a token takes is made otherwise with data."""
    config = replace(CONFIG, **MODES[mode])
    _, planned = simulation(config)
    # A token that sees nothing, itself included, has no numbers to learn from.
    monkeypatch.setattr(torch.Tensor, "isfinite", passes)
    _, real = simulation(config, device="cpu")
    assert list(planned.peaks) == list(real.peaks) == ["load", "rollout", "score", "update"]
    for phase, peak in real.peaks.items():
        assert planned.peaks[phase] == pytest.approx(peak, rel=0.05), phase
    assert planned.components["base weights"] == real.components["base weights"]


@pytest.mark.parametrize("mode", ["lora", "critic adapter", "hydra", "full"])
def test_components_are_the_bytes_of_the_real_objects(mode, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", passes)
    config = replace(CONFIG, **MODES[mode])
    made, _ = simulation(config, device="cpu")
    _, planned = simulation(config)
    names = dict(made.backbone.named_parameters())
    assert planned.components["adapters"] == sum(
        p.numel() * 4 for name, p in names.items() if "lora_" in name
    )
    assert planned.components["value head"] == 4 * (tiny.config().hidden_size + 1)
    weights = planned.components["base weights"] + planned.components["embedding and head"]
    model = tiny.model()
    assert weights == tensor_bytes(list(model.parameters()), list(model.buffers()))
    c, length = tiny.config(), PROMPT + config.response_length
    cache = 2 * c.num_hidden_layers * 8 * c.num_key_value_heads * length * 8 * 4
    assert planned.components["KV cache"] == cache
    split = made.backbone.halves.split
    assert planned.components["trunk cache"] == (8 * length * c.hidden_size * 4 if split else 0)
    assert planned.components["gradients"] == sum(p.numel() * 4 for p in made.backbone.trainable())


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit", "adamw_torch"])
def test_optimizer_state_is_what_a_step_makes(optim):
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (5000, 4096, 300)]
    optimizer = make_optimizer(parameters, replace(CONFIG, optim=optim))
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = [x for held in optimizer.state.values() for x in held.values()]
    # Counters of a number each, and the codes that all tensors share, are not counted.
    held = [x for x in state if isinstance(x, torch.Tensor) and x.numel() not in (1, 256)]
    assert optimizer_bytes(parameters, optim, "cpu") == tensor_bytes(held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_the_head_works_in_the_bytes_that_are_counted(dtype, trains, monkeypatch):
    """Against what `ChunkedHead` allocates while it runs, seen from inside."""
    hidden = torch.randn(40, 64).to(dtype).requires_grad_(trains)
    weight, ones = torch.randn(5000, 64).to(dtype), torch.ones(40)
    counted: list[int] = []

    def call():
        return linear_policy_loss(
            hidden, weight, torch.zeros(40, dtype=torch.long), -ones, ones, ones.bool(),
            PolicyLossSpec(kl_coef=0.1), ref_hidden=hidden.detach(), num_items=40, workspace_mb=1,
        )  # fmt: skip

    monkeypatch.setattr(
        "fastrlhf.memory_tracking.head_workspace",
        lambda *given: counted.append(head_workspace(*given)) or 0,
    )
    with StorageTracker():
        call()

    inside = StorageTracker()
    for given in (hidden, weight):
        inside.see(given)
    before = inside.live
    statistics, backward = ChunkedHead.__init__, ChunkedHead.backward

    def watched(function):
        def run(*args, **kwargs):
            with inside:
                return function(*args, **kwargs)

        return run

    monkeypatch.setattr(ChunkedHead, "__init__", watched(statistics))
    monkeypatch.setattr(ChunkedHead, "backward", watched(backward))
    monkeypatch.setattr(ChunkedHead, "statistics", watched(ChunkedHead.statistics))
    call()
    assert counted[0] == pytest.approx(inside.peak - before, rel=0.1)


def test_a_smaller_microbatch_and_checkpoints_are_planned_to_save():
    config = replace(CONFIG, train_layers="all", microbatch_tokens=128)
    sizes = [
        plan(changed, model_config=tiny.config(), device=device, prompt_length=PROMPT)
        for device in ("cpu", "cuda")
        for changed in (
            config, replace(config, microbatch_tokens=16),
            replace(config, gradient_checkpointing=True),
        )
    ]  # fmt: skip
    for start in (0, 3):
        whole, small, checkpointed = (p.phases["update"] for p in sizes[start : start + 3])
        assert small < whole and checkpointed < whole


def stored(linear):
    """Bytes of a bitsandbytes linear's weight with its scales and codes."""
    weight = linear.weight
    if (state := getattr(weight, "quant_state", None)) is None:
        return tensor_bytes(weight.data, weight.SCB)
    scales = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return tensor_bytes(weight.data, *scales)


@pytest.mark.parametrize("kind", [nf4, int8])
def test_quantised_weights_are_planned_as_bitsandbytes_stores_them(kind):
    with torch.device("meta"):
        planned = kind(torch.nn.Linear(300, 128, bias=False), torch.float32)
    options = {"quant_type": "nf4"} if kind is nf4 else {"has_fp16_weights": False}
    if kind is nf4:
        options["compress_statistics"] = True
    real = type(planned)(300, 128, bias=False, **options).to("cpu")
    assert stored(planned) == stored(real)


def test_sizes():
    assert parse_size("16GB") == 2**34 and parse_size("7.5 GiB") == int(7.5 * 2**30)
    assert parse_size("900mb") == 900 * 2**20
    assert size(2**34) == "16.00 GB" and size(5 * 2**20) == "5.0 MB"
    for wrong in ("16", "GB", "-1GB", "0GB"):
        with pytest.raises(UserError, match="is not a size"):
            parse_size(wrong)


def test_planned_beside_measured():
    figures, told = planned_and_measured(
        CONFIG, tiny.config(), {"update": 2**26}, prompt_length=PROMPT, device="cpu"
    )
    assert figures["update"]["measured"] == 64 and figures["update"]["planned"] > 64
    assert figures["load"]["measured"] is None and "load " in told
    figures, told = planned_and_measured(CONFIG, None, {}, prompt_length=PROMPT, device="cpu")
    assert figures["update"] == {"planned": None, "measured": None}


def test_a_model_that_cannot_be_planned_costs_a_run_nothing(monkeypatch):
    def fails(*_):
        raise RuntimeError("grouped_mm is not implemented\nfor meta tensors")

    monkeypatch.setattr(Simulation, "rollout", fails)
    with pytest.raises(UserError, match=r"cannot be planned: .*grouped_mm .* for meta tensors"):
        plan(CONFIG, model_config=tiny.config(), prompt_length=PROMPT)
    figures, told = planned_and_measured(
        CONFIG, tiny.config(), {"update": 2**26}, prompt_length=PROMPT, device="cpu"
    )
    assert figures["update"] == {"planned": None, "measured": 64}
    assert told.endswith("update ? / 64")
    with pytest.raises(RuntimeError, match="grouped_mm"):
        simulation(CONFIG, device="cpu")


def test_an_evaluation_larger_than_a_batch_is_told_too():
    given = {"prompt_length": PROMPT, "device": "cpu"}
    for prompts, told in ((4, False), (32, True)):
        config = replace(CONFIG, eval_prompts=prompts)
        figures, line = planned_and_measured(config, tiny.config(), {"evaluate": 2**26}, **given)
        assert figures["evaluate"]["measured"] == 64
        assert ("evaluate" in line) == told == (figures["evaluate"]["planned"] is not None)


def test_the_command(capsys, tmp_path):
    tiny.config().save_pretrained(tmp_path)
    words = ["plan", f"model={tmp_path}", "batch_size=8", "total_episodes=8", "train_layers=2",
             "response_length=8", "--prompt-length", "6", "eval_prompts=4"]  # fmt: skip
    assert main([*words, "--memory", "8GB"]) == 0
    out, err = capsys.readouterr()
    assert "base weights" in out and "fits" in out and not err
    assert main([*words, "--json", "--gpu", "16GB"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] and record["device"] == "cuda" and record["phases"]["update"] > 0
    for more, message in (
        (["--gpu", "16"], "is not a size"),
        (["--gpu", "1GB", "--memory", "1GB"], "not both"),
        (["train_layers=9"], "the model has 4 layers"),
    ):
        assert main([*words, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("fastrlhf: error:") == 1 and message in err


def test_the_command_below_the_minimum_still_shows_the_plan(capsys, tmp_path):
    tiny.config().save_pretrained(tmp_path)
    words = ["plan", f"model={tmp_path}", "batch_size=1", "total_episodes=1", "train_layers=1",
             "response_length=8", "eval_prompts=1", "--gpu", "1MB",
             "num_mini_batches=1"]  # fmt: skip
    assert main([*words, "--prompt-length", "6"]) == 2
    out, err = capsys.readouterr()
    assert "prompts of up to 6 tokens" in out and "too much" in out and "too little for" in err
    assert main([*words, "--json", "--prompt-length", "6"]) == 2
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["fits"] is False and record["changes"] is None and "too little for" in err


def test_the_command_says_what_it_assumes_and_what_the_model_cannot_have(capsys, tmp_path):
    shape = tiny.config()
    shape.max_position_embeddings = 300
    shape.save_pretrained(tmp_path)
    words = ["plan", f"model={tmp_path}", "batch_size=2", "total_episodes=2", "train_layers=1"]
    assert main([*words, "response_length=8"]) == 0
    assert "assumed prompt length 256: give --prompt-length" in capsys.readouterr().out
    assert main([*words, "response_length=8", "--prompt-length", "293"]) == 2
    message = "293 tokens, which with response_length 8 exceeds the model's context of 300"
    assert message in capsys.readouterr().err


def test_help_names_what_auto_may_change(capsys):
    with pytest.raises(SystemExit):
        main(["ppo", "--help"])
    told = capsys.readouterr().out.partition("\n  --auto")[2].partition("\n  --gpu 16GB")[0]
    assert all(setting in told for setting in AUTOMATIC)


def test_without_kernels_sampling_is_planned_with_its_copies(monkeypatch):
    shape = tiny.config()
    shape.vocab_size = 5000
    given = {"config": CONFIG, "model_config": shape, "kind": "cpu", "prompt_length": PROMPT}
    lean = Simulation(**given).run().peaks["rollout"]
    monkeypatch.setattr("fastrlhf_kernels._cpu.available", lambda: False)
    planned = Simulation(**given).run().peaks["rollout"]
    # Logits, probabilities and their sums in float64.
    assert planned > lean + 3 * 8 * 8 * 5000
    monkeypatch.setattr("fastrlhf_kernels._backend._device_backend", lambda *_: "reference")
    monkeypatch.setattr(torch.Tensor, "isfinite", passes)
    real = Simulation(**given, device="cpu").run().peaks["rollout"]
    assert planned == pytest.approx(real, rel=0.05)


def test_auto_wants_a_budget(capsys):
    for words, message in ((["--auto"], "--auto needs a budget"), (["--gpu", "1GB"], "add --auto")):
        assert main(["ppo", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "other"), [(False, ("--gpu", "--memory")), (True, ("--memory", "--gpu"))]
)
def test_auto_plans_for_the_device_that_computes(gpu, other, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    given, wanted = other
    assert main(["ppo", "--auto", given, "3GB"]) == 2
    assert f"give {wanted} 3GB" in capsys.readouterr().err
