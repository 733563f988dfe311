"""`fastrlhf eval` on runs of every kind and on models: their own figures again, and a fair pair."""

import json
import os

import pytest
import tiny

from fastrlhf.cli import main

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
