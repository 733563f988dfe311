"""The rows of bench/pareto.py: what the table says of them, and what the committed ones show."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "bench/results/pareto.jsonl"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("pareto")


def row(seed, point, sentiment, brevity):
    scores = {"sentiment": {"value": sentiment}, "brevity": {"value": brevity}}
    weights = [0, 0] if point is None else [1 - point / 2, point / 2]
    others = dict(kl=1.5, distinct_2=0.9, dominated=point == 1, prompts=8, seconds=60.0)
    machine = dict(device="a machine", torch="2", threads=1)
    return scores | dict(seed=seed, point=point, weights=weights) | others | machine


def test_the_table_is_of_means_over_seeds(bench, monkeypatch):
    points = [(None, 0.1, 0.2), (0, 0.8, 0.2), (1, 0.6, 0.5), (2, 0.0, 0.6)]
    rows = [row(seed, p, x + 0.1 * (seed - 1), y) for seed in (1, 2) for p, x, y in points]
    monkeypatch.setattr(bench, "read", lambda name: rows)
    picture, _, *lines = bench.table().splitlines()
    assert picture.endswith("(pareto.png)")
    assert lines[2] == "| before training | +0.150 | 0.200 |  | 1.50 | 0.90 |  |"
    # At a quarter of the way by sentiment, the line between the ends is at 0.3.
    assert lines[4] == "| 0.5 : 0.5 | +0.650 | 0.500 | +0.200 | 1.50 | 0.90 | 2 of 2 seeds |"
    assert "+0.000" in lines[3] and "+0.000" in lines[5]
    assert "means of 2 seeds" in lines[-1] and "1.0 minutes" in lines[-1]
    monkeypatch.setattr(bench, "read", lambda name: [])
    assert bench.table() == "Not measured yet."


@pytest.mark.skipif(not ROWS.exists(), reason="bench/pareto.py has not been run")
def test_each_policy_is_better_than_the_base_at_what_it_was_trained_for():
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    for seed in {row["seed"] for row in rows}:
        base, *points = (row for row in rows if row["seed"] == seed)
        for name, end in (("sentiment", points[0]), ("brevity", points[-1])):
            assert end[name]["low"] > base[name]["value"], (seed, name)
        assert sum(not point["dominated"] for point in points) >= 3, seed
