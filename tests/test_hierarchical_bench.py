"""The bench of modes: its kinds of prompts, its reward, and that the page says what rows say."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import hierarchical as bench
import hierarchical_figure
import mode_prompts
import results
from mode_prompts import FACTS, SCENES


def test_no_held_out_prompt_is_trained_on_and_kinds_are_even():
    train, held_out = mode_prompts.rows()
    texts = [row["prompt"] for row in (*train, *held_out)]
    assert len(set(texts)) == len(texts) == 128
    for part in (train, held_out):
        assert sum(row["kind"] == FACTS for row in part) == len(part) / 2
    assert mode_prompts.rows() == (train, held_out)


def test_the_reward_wants_a_word_for_a_fact_and_friendly_words_for_a_scene():
    glad = "A wonderful happy day, and everybody smiled and laughed in the warm sun\nand so on"
    answers = ["Paris.", "The capital is Paris, of course", "Rome", glad, "No.", "x " * 12]
    kinds = [FACTS] * 3 + [SCENES] * 3
    scores = mode_prompts.fitting(answers, kinds, ["Paris"] * 3 + [""] * 3)
    assert scores[0] == 1.0 and scores[1] == pytest.approx(0.75) and scores[2] == 0.5
    assert scores[3] > 0.9 and scores[4] < 0.1 and scores[5] == 0.5


def row(arm, seed, episodes, score):
    kinds = {
        kind: {"score": score, "modes": {"concise": 1.0}, "example": ["concise", "text"]}
        for kind in (FACTS, SCENES)
    }
    figures = {"score": score, "kl": 1.0, "seconds": 60.0, "device": "cpu", "torch": "2"}
    return {"arm": arm, "seed": seed, "episodes": episodes, "by_kind": kinds} | figures


def test_the_table_counts_the_seeds_that_the_hierarchical_policy_wins():
    rows = [
        row(arm, seed, episodes, 0.1 if not episodes else end)
        for arm, ends in (("flat", (0.5, 0.5)), ("hierarchical", (0.8, 0.4)))
        for seed, end in enumerate(ends, start=1)
        for episodes in (0, 128)
    ]
    text = hierarchical_figure.told(rows)
    assert "ends above flat in 1 of 2 seeds" in text
    assert "| hierarchical | 1 | 0.10 | 0.80 | 0.80 |" in text


def test_samples_are_told_by_kind():
    samples = [
        {"score": 1.0, "completion": "Paris", "mode": "concise"},
        {"score": 0.0, "completion": "a  b", "mode": "creative"},
        {"score": 0.5, "completion": "Rome", "mode": "creative"},
    ]
    found = bench.by_kind(samples, [FACTS, SCENES, FACTS])["by_kind"]
    assert found[FACTS]["score"] == 0.75 and found[SCENES]["example"] == ["creative", "a b"]
    assert found[FACTS]["modes"] == {"concise": 0.5, "creative": 0.5}


def test_the_page_says_what_the_rows_say():
    rows, page = results.read("hierarchical"), results.ROOT / "docs/hierarchical.md"
    tables = {"hierarchical": lambda: hierarchical_figure.told(rows)}
    assert results.with_tables(page.read_text(), tables) == page.read_text()
