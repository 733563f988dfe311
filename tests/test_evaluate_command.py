"""`fastrlhf eval` on runs of every kind and on models: their own figures again, and a fair pair."""

import dataclasses
import json
import os

import pytest
import tiny

from fastrlhf import PPOConfig, PPOTrainer, evaluate_command
from fastrlhf.cli import main
from fastrlhf.config import load_config

SETTINGS = dict(
    model="model", dataset="prompts.jsonl", reward="mine.py:letters", total_episodes=96,
    batch_size=32, response_length=8, train_layers=2, eval_prompts=24, learning_rate="1e-2",
    kl_coef=0.02, num_samples=0,
)  # fmt: skip
COMMON = [f"{key}={value}" for key, value in SETTINGS.items()]
KINDS = {
    "lora": [],
    "top": ["use_peft=false"],
    "whole": ["use_peft=false", "train_layers=all", "learning_rate=1e-3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of every kind."""
    path = tmp_path_factory.mktemp("runs")
    tiny.folder(path / "model")
    prompts = [json.dumps({"prompt": a + b}) for a in "abcdefgh" for b in "ijklmnop"]
    (path / "prompts.jsonl").write_text("\n".join(prompts))
    (path / "mine.py").write_text(
        "def letters(completions, **_):\n    return [c.count('e') / 4 for c in completions]\n"
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
        "def nothing(completions, **_):\n    return [None for c in completions]\n"
    )
    before = os.getcwd()
    os.chdir(path)
    try:
        for name, changes in KINDS.items():
            assert main(["ppo", *COMMON, *changes, f"output_dir={name}"]) == 0
    finally:
        os.chdir(before)
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def evaluated(*words):
        status = main(["eval", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return evaluated


@pytest.mark.parametrize("kind", KINDS)
def test_a_runs_own_figures_come_out_again(run, folder, kind):
    """Before and after training, on the same prompts with the same seeds."""
    status, out, err = run(kind, "--json")
    assert status == 0, err
    report = json.loads(out)
    kept = [json.loads(x) for x in (folder / kind / "evaluations.jsonl").read_text().splitlines()]
    figures = report["rewards"]["mine.py:letters"]
    assert figures["policy"]["value"] == pytest.approx(kept[-1]["score"], abs=1e-6)
    assert figures["reference"]["value"] == pytest.approx(kept[0]["score"], abs=1e-6)
    assert report["kl"]["value"] == pytest.approx(kept[-1]["kl"], rel=1e-4) and kept[-1]["kl"] > 0
    assert report["entropy"] == pytest.approx(kept[-1]["entropy"], rel=1e-4)
    assert report["reference_entropy"] == pytest.approx(kept[0]["entropy"], rel=1e-4)
    assert figures["difference"]["low"] <= figures["difference"]["value"]
    assert report["policy"] == f"{kind}/checkpoints/final" and report["prompts"] == 24


def test_several_rewards_and_samples_side_by_side(run):
    words = ["--reward", "mine.py:letters", "--reward", "mine.py:length", "--prompts", "5"]
    status, out, _ = run("lora", *words, "--samples", "2")
    assert status == 0 and out.count("win rate") == 2 and "5 prompts" in out
    assert out.count("\n  policy    ") == 2 + 2 and "KL spent" in out
    _, out, _ = run("lora", *words, "--json")
    report = json.loads(out)
    assert len(report["samples"]) == 5
    first = report["samples"][0]
    assert first["scores"]["mine.py:length"]["policy"] == len(first["policy"])


def test_a_sum_is_shown_by_objective(run):
    words = ["--reward", "mine.py:letters", "--reward", "sentiment + 0.5*length_band(1, 2)"]
    status, out, err = run("lora", *words, "--prompts", "5", "--json")
    assert status == 0, err
    total = "sentiment + 0.5*length_band(1, 2)"
    found = {k: v["policy"]["value"] for k, v in json.loads(out)["rewards"].items()}
    parts = [found[f"{total}: {name}"] for name in ("sentiment", "length_band")]
    assert found[total] == pytest.approx(parts[0] + 0.5 * parts[1], abs=1e-6)
    assert parts[1] > 0, "else the weight is not seen"
    assert len(found) == 4


def test_models(run):
    words = ["--dataset", "prompts.jsonl", "--reward", "mine.py:letters"]
    status, out, _ = run("model", *words, "--reference", "model", "--json")
    report = json.loads(out)
    assert status == 0
    # The same model with the same seeds says the same.
    assert report["rewards"]["mine.py:letters"]["win_rate"]["value"] == 0.5
    assert report["kl"]["value"] == 0
    assert all(sample["policy"] == sample["reference"] for sample in report["samples"])
    status, out, _ = run("model", *words)
    assert status == 0 and "win rate" not in out and "KL spent      not measured" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at-all", "--dataset=prompts.jsonl", "--reward=sentiment"], "cannot be loaded"),
        (["model", "--reward=sentiment"], "a model says nothing of its dataset; give --dataset"),
        (["model", "--dataset=prompts.jsonl"], "give --reward"),
        (["lora", "--checkpoint=finel"], "has no checkpoint 'finel'; did you mean 'final'"),
        (["lora", "--reference=model"], "leave --reference out"),
        (["lora", "--reward=mine.py:nothing"], "judged no prompt"),
        (["lora", "--prompts=25"], "the run held out 24"),
        (["lora", "--prompts=0"], "--prompts must be at least 1"),
        (["lora", "--promts=2"], "is no option"),
    ],
)
def test_bad_input(run, words, message):
    status, out, err = run(*words)
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err


def test_a_checkpoint_of_another_model(run, folder):
    weights = folder / "top/checkpoints/final/trained_layers.safetensors"
    config = folder / "top/config.yaml"
    text = config.read_text()
    config.write_text(text.replace("train_layers: 2", "train_layers: 1"))
    status, _, err = run("top")
    config.write_text(text)
    assert status == 2 and "is not of this model" in err
    kept = weights.read_bytes()
    weights.write_bytes(kept[:100])
    status, _, err = run("top")
    weights.write_bytes(kept)
    assert status == 2 and "cannot be read" in err


def test_a_run_that_was_given_its_parts_from_python(run, folder):
    def many_e(completions, **_):
        return [text.count("e") / 4 for text in completions]

    args = load_config(str(folder / "lora/config.yaml"), ())
    args = dataclasses.replace(args, output_dir="python", total_episodes=32, reward="sentiment")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    (folder / "held.jsonl").write_text('{"prompt": "q"}\n{"prompt": "r"}')
    held_out = [{"prompt": "q"}, {"prompt": "r"}]
    PPOTrainer("model", many_e, args, rows, held_out).train()
    given = json.loads((folder / "python/given.json").read_text())
    assert given == {"model": "model", "train_dataset": True, "eval_dataset": True, "reward": True}
    for words, message in (
        ([], "the run's prompts were given from Python"),
        (["--dataset=held.jsonl"], "the run's reward was given from Python"),
        (["--reward=mine.py:letters"], "give --dataset"),
    ):
        status, out, err = run("python", *words)
        assert status == 2 and out == "" and message in err
    words = ["--dataset=held.jsonl", "--reward=mine.py:letters", "--json"]
    status, out, err = run("python", *words)
    assert status == 0, err
    kept = [json.loads(x) for x in (folder / "python/evaluations.jsonl").read_text().splitlines()]
    report = json.loads(out)
    assert report["prompts"] == 2
    value = report["rewards"]["mine.py:letters"]["policy"]["value"]
    assert value == pytest.approx(kept[-1]["score"], abs=1e-6)
    # The settings' own data set was not what training held prompts out of.
    status, out, _ = run("python", "--dataset=prompts.jsonl", *words[1:])
    assert status == 0 and json.loads(out)["prompts"] == 64


def test_the_kl_of_a_run_that_took_the_samplers_word(run, folder, capsys):
    """Training measured none; what its policy has spent is exact all the same."""
    changes = ["num_generations=4", "old_logprobs=sampled", "output_dir=sampled"]
    assert main(["grpo", *COMMON, *changes, "kl_coef=0", "total_episodes=32"]) == 0
    capsys.readouterr()
    status, out, err = run("sampled", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["kl"]["value"] > 0 and len(report["samples"]) == 24


def test_a_run_is_judged_on_what_it_held_out_though_the_data_has_changed(run, folder):
    data = folder / "prompts.jsonl"
    before = data.read_text()
    kept = [json.loads(x) for x in (folder / "lora/samples.jsonl").read_text().splitlines()]
    held_out = [line["prompt"] for line in kept if line["step"] == 0]
    _, same, err = run("lora", "--json")
    assert "has changed" not in err
    data.write_text('{"prompt": "zz"}\n' + before)
    status, out, err = run("lora", "--json")
    assert status == 0 and "prompts.jsonl has changed since the run; its own" in err
    assert [x["prompt"] for x in json.loads(out)["samples"]] == held_out
    assert json.loads(out) == json.loads(same)
    # Nothing is left to train on, but what was held out is there.
    data.write_text("\n".join(json.dumps({"prompt": text}) for text in held_out))
    status, out, _ = run("lora", "--json")
    assert status == 0 and json.loads(out) == json.loads(same)
    others = [x for x in before.split("\n") if json.loads(x)["prompt"] not in held_out[:2]]
    data.write_text("\n".join(others))
    status, out, err = run("lora", "--json")
    data.write_text(before)
    assert status == 2 and out == ""
    assert "2 of the 24 prompts that it held out are gone; give --dataset" in err


def test_names_given_from_python_take_the_place_of_settings(run, folder):
    assert set(json.loads((folder / "top/given.json").read_text()).values()) == {None}
    (folder / "held.jsonl").write_text('{"prompt": "q"}\n{"prompt": "r"}')
    given = {"reward": ["mine.py:length"], "eval_dataset": "held.jsonl"}
    (folder / "top/given.json").write_text(json.dumps(given))
    status, out, err = run("top", "--json")
    (folder / "top/given.json").unlink()
    assert status == 0, err
    report = json.loads(out)
    assert report["prompts"] == 2 and list(report["rewards"]) == ["mine.py:length"]


def test_judges_have_the_runs_settings():
    settings = PPOConfig(
        reward=["sentiment", "repetition"], reward_timeout=7.0, reward_retries=5,
        reward_weights=[1.0, 2.0], reward_bounds=[-1, 1],
    )  # fmt: skip
    asked = evaluate_command.Asked("run")
    for scorer in evaluate_command.judges(asked, settings).values():
        kept = scorer.settings
        assert (kept.reward_timeout, kept.reward_retries, kept.reward_weights) == (7.0, 5, None)
        assert kept.reward_bounds == [-1, 1]
    one = dataclasses.replace(settings, reward="sentiment + repetition")
    (scorer,) = evaluate_command.judges(asked, one).values()
    assert scorer.settings.reward_weights == [1.0, 2.0]
    asked = evaluate_command.Asked("run", rewards=["length_band"])
    (scorer,) = evaluate_command.judges(asked, settings).values()
    kept = scorer.settings
    assert kept.reward_timeout == 7.0 and kept.reward_weights is kept.reward_bounds is None


def test_a_reference_with_other_tokens(run, folder):
    tiny.folder(folder / "other")
    path = folder / "other/tokenizer.json"
    text = json.loads(path.read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(text))
    words = ["--dataset=prompts.jsonl", "--reward=mine.py:letters", "--reference=other"]
    status, out, err = run("model", *words)
    assert status == 2 and out == "" and "other has other tokens than model" in err
