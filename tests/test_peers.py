"""The comparison with TRL: what the sides are given, their turns, and what is made of the rows."""

import dataclasses
import importlib
import os
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
SIDE = """
import sys
from turns import Gate

gate = Gate()
for score in (1.0, 2.0, 3.0):
    gate.wait()
    print("noise that trainers print")
    gate.done(score, {"rollout": 0.25, "score": 0.0, "update": 0.5})
if len(sys.argv) > 3:
    raise SystemExit("no model there")
"""


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.syspath_prepend(BENCH / "peers")


def start(tmp_path, *arguments):
    script = tmp_path / "side.py"
    script.write_text(SIDE)
    environment = dict(os.environ) | {"PYTHONPATH": str(BENCH / "peers")}
    command = [sys.executable, str(script), *arguments]
    turns = importlib.import_module("turns")
    return turns.Side("a side", command, environment, tmp_path / "log")


def test_a_side_takes_a_step_when_it_is_told(tmp_path):
    side = start(tmp_path)
    try:
        said = [side.step(), side.step()]
    finally:
        side.close()
    assert [step["score"] for step in said] == [1.0, 2.0]
    assert said[0]["phases"] == {"rollout": 0.25, "score": 0.0, "update": 0.5}
    assert 0 <= said[0]["seconds"] < 5 and said[0]["peak_mb"] >= said[0]["imported_mb"] > 1
    assert side.process.returncode == 0


def test_what_a_side_said_before_it_failed_is_told(tmp_path):
    side = start(tmp_path, "more")
    try:
        for _ in range(3):
            side.step()
        with pytest.raises(RuntimeError, match=r"a side ended[^$]*no model there"):
            side.step()
    finally:
        side.close()


def test_the_model_its_tokenizer_and_the_reward(tmp_path):
    workload = importlib.import_module("workload")
    from transformers import AutoModelForCausalLM

    workload.make_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert round(model.num_parameters() / 1e6) == 12
    tokenizer = workload.load_tokenizer(tmp_path)
    given = workload.Workload("ppo", True, 1)
    lengths = {len(tokenizer(text)["input_ids"]) for text in workload.prompts(given, 20)}
    assert lengths == {given.prompt_tokens}
    assert min(tokenizer.eos_token_id, tokenizer.pad_token_id) >= model.config.vocab_size
    reward = workload.Reward()
    assert reward(completion_ids=[[0, 31999], [15999, 15999]], prompts=[]) == [0.5, 1.0]
    assert reward.last == 0.75
    given.write(tmp_path / "workload.json")
    assert workload.Workload.read(tmp_path / "workload.json") == given


def step(seconds, score=0.5, peak=100.0):
    phases = {"rollout": seconds / 4, "score": seconds / 4, "update": seconds / 2}
    return dict(
        seconds=seconds, cpu_seconds=seconds, score=score, phases=phases, peak_mb=peak,
        imported_mb=50.0,
    )  # fmt: skip


def test_the_first_step_is_not_timed_but_its_memory_counts():
    run = importlib.import_module("run")
    given = run.Workload("grpo", True, 4)
    row = run.speed_row(given, "x", [step(99.0, peak=300.0), step(2.0), step(4.0), step(8.0)])
    assert row["seconds"] == 4.0 and row["steps"] == 3 and row["peak_mb"] == 300.0
    assert row["samples_per_second"] == 8.0 and row["tokens_per_second"] == 512.0
    assert row["phases"] == {"rollout": 1.0, "score": 1.0, "update": 2.0}


def test_the_table_holds_each_side_against_trl(monkeypatch):
    run, peers_table = importlib.import_module("run"), importlib.import_module("peers_table")
    machine = {"device": "a CPU", "torch": "2", "threads": 2}
    given = run.Workload("ppo", False, 2)
    rows = [
        run.speed_row(given, "fastrlhf", [step(9.0), step(2.0, peak=150.0)]),
        run.speed_row(given, "TRL 1.10", [step(9.0), step(8.0, peak=600.0)]),
    ]
    for side, seed, scores in (
        ("fastrlhf", 1, (0.25, 0.5, 0.75)),
        ("fastrlhf", 2, (0.25, 0.5, 0.15)),
        ("TRL 1.10", 1, (0.2, 0.2, 0.2)),
        ("TRL 1.10", 2, (0.4, 0.4, 0.4)),
    ):
        own = dataclasses.replace(given, seed=seed)
        rows.append(run.curve_row(own, side, [step(1.0, score) for score in scores]))
    monkeypatch.setattr(peers_table, "read", lambda name: [machine | row for row in rows])
    made = peers_table.table()
    assert (
        "| PPO, all weights: fastrlhf | 16.00 | 4.0 | 1024 | 0.50, 0.50, 1.00 | 150 | 0.25 |"
        in made
    )
    assert "| PPO, all weights: TRL 1.10 | 4.00 | 1.0 |" in made
    # By seed the means are 0.5 and 0.3, and 0.2 and 0.4: the same variance, 0.02.
    assert "| PPO, all weights: fastrlhf | 2 | 0.250 | 0.400 | 0.475 | +0.100 ± 0.141 |" in made
    assert "| PPO, all weights: TRL 1.10 | 2 | 0.300 | 0.300 | 0.300 |  |" in made
    monkeypatch.setattr(peers_table, "read", lambda name: [])
    assert peers_table.table() == "Not measured yet."
