"""PPO against a reward model: what the table says of the rows, and what the committed ones show."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "bench/results/reward_ppo.jsonl"
HACKED = {"gold", "repetition", "diversity", "compression"}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("reward_ppo")


def evaluation(arm, seed, step, score):
    judged = dict(score=score, vader=score / 2, minilm=-score, kl=4.0 * step, distinct_2=0.75)
    machine = dict(device="a machine", torch="2", minilm_accuracy=0.8)
    return dict(kind="evaluation", arm=arm, seed=seed, step=step) | judged | machine


def test_the_table_has_all_judges_and_signs(bench, monkeypatch):
    rows = [
        evaluation("none", 1, 0, 0.5),
        evaluation("none", 1, 3, 0.7),
        evaluation("none", 1, 6, 1.5),
        dict(kind="finding", arm="none", seed=1, step=4, sign="repetition"),
        evaluation("kl", 2, 0, 0.5),
        evaluation("kl", 2, 6, 1.0),
    ]
    monkeypatch.setattr(bench, "read", lambda name: rows)
    made = bench.table()
    kept = "| with a KL penalty | 2 | +0.50 → +1.00 | +0.25 → +0.50 | -0.50 → -1.00 | 24.00 | 0.75 "
    assert kept + "| none |" in made
    assert "| without | 1 | +0.50 → +1.50 | +0.25 → +0.75 | -0.50 → -1.50 | 24.00 |" in made
    assert "| repetition (4) |" in made and made.startswith("![") and "after 6 rollouts" in made
    monkeypatch.setattr(bench, "read", lambda name: [])
    assert bench.table() == "Not measured yet."


@pytest.mark.skipif(not ROWS.exists(), reason="bench/reward_ppo.py has not been run")
def test_other_judges_agree_with_a_kl_penalty_and_the_monitor_speaks_without():
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    runs = {(row["arm"], row["seed"]) for row in rows}
    assert len({seed for _, seed in runs}) >= 3
    for arm, seed in runs:
        own = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        first, *_, last = (row for row in own if row["kind"] == "evaluation")
        assert last["score"] > first["score"]
        signs = {row["sign"] for row in own if row["kind"] == "finding"} & HACKED
        if arm == "kl":
            assert last["vader"] > first["vader"] and last["minilm"] > first["minilm"], seed
            assert last["distinct_2"] > 0.8 * first["distinct_2"]
        else:
            assert signs, f"seed {seed} lost its KL, and the monitor said nothing"
