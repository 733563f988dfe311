"""The bench of agents: the page says what the rows say, and each arm is drawn where it belongs."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def figure(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("multi_agent_figure")


def competitive(arm, seed, before, after):
    about = {"game": "competitive", "arm": arm, "seed": seed}
    start = json.dumps({"numbers": [2, 3]})
    return [
        about | {"kind": "exam", "step": 0, "solved": before},
        about | {"kind": "exam", "step": 22, "solved": after},
        about | {"kind": "sample", "step": 22, "prompt": start, "completion": f"seed {seed} | `"},
    ]


def tournament(seed, solver, shares):
    about = {"game": "competitive", "kind": "tournament", "seed": seed, "arm": solver}
    return [about | {"solver": solver, "step": i, "solved": x} for i, x in enumerate(shares)]


def test_the_table_has_a_line_for_each_arm_and_seed(figure):
    rows = [
        *competitive("no pool", 4, 0.2, 0.3),
        *competitive("pool", 4, 0.2, 0.5),
        *competitive("pool", 3, 0.1, 0.6),
        *competitive("no pool", 3, 0.1, 0.4),
        # A proposer whose sums were all invalid counts for nobody.
        *tournament(3, "pool", [0.5, None, 0.7]),
        *tournament(4, "pool", [0.4, 0.4, 0.4]),
        *tournament(3, "no pool", [0.3, None, 0.3]),
        *tournament(3, "untrained", [0.0, None, 0.2]),
    ]
    made = figure.table(rows)
    assert "| competitive | with past selves | 3 | 0.10 | 0.60 |" in made
    assert "| competitive | with past selves | 4 | 0.20 | 0.50 |" in made
    assert "| competitive | without past selves | 4 | 0.20 | 0.30 |" in made
    assert "untrained: 0.10; without past selves: 0.30; with past selves: 0.60, 0.40." in made
    # The first seed that was run is quoted, as text that breaks no table.
    assert "- competitive, after 22 rounds: `seed 3 ·  `" in made
    assert figure.table([]) == "Not measured yet."


def test_the_matrix_counts_what_the_solver_wins(figure):
    assert figure.lost_by_proposer([0.25, None, 0.75]) == 0.5
    assert figure.lost_by_proposer([0.0]) == 1.0
