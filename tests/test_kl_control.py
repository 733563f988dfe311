"""What the bench of KL control says of its rows, and the judge it says it with."""

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import kl_control
import kl_figure
import results
from review_words import ReviewWords

TEXTS = ["a good film", "a good story", "a film of good taste"]


def rows(arm="adaptive", seed=1, kl=kl_control.TARGET):
    figures = {"score": 0.5, "kl_coef": 0.05, "distinct_2": 0.9, "repetition": 0.0, "gold": -5.0}
    about = {"arm": arm, "seed": seed}
    steps = range(1, 10)
    made = [
        {"kind": "step", "step": i} | about | figures | {"kl": kl if i > 6 else 0} for i in steps
    ]
    finding = {"kind": "finding", "step": 7, "sign": "repetition", "sentence": "They repeat."}
    samples = [
        {"kind": "sample", "step": step, "score": score, "completion": f"text of {score}"} | about
        for step in (0, 9)
        for score in (0.1, 0.5, 0.9)
    ]
    return made + ([finding | about] if arm == "none" else []) + samples


@pytest.mark.parametrize("share, held", [(0.79, 1), (0.81, 2), (1.19, 2), (1.21, 1)])
def test_the_rule_for_the_controller(share, held):
    text = kl_figure.told(rows() + rows(seed=2, kl=share * kl_control.TARGET))
    assert f"It holds for {held} of 2 seeds" in text


def test_only_the_last_third_counts_and_signs_and_samples_are_told():
    text = kl_figure.told(rows() + rows("none", kl=30.0))
    assert "| 30.00 |" in text and "repetition (7)" in text
    assert "They repeat." in text and "text of 0.5" in text and "text of 0.1" not in text


def test_the_judge_is_minus_the_kl_of_words():
    judge = ReviewWords(TEXTS)
    # The reviews themselves have the reviews' words.
    scores, lengths = judge(TEXTS), [len(text.split()) for text in TEXTS]
    assert scores == pytest.approx([0.0] * len(TEXTS))
    worse = judge(["good good good", "a good good"])
    total = sum(score * 3 for score in worse) / 6
    # good: 5 of 6 words where the reviews have 3 of 11; a: 1 where they have 3.
    by_hand = -(5 / 6 * math.log(5 / 6 / (3 / 11)) + 1 / 6 * math.log(1 / 6 / (3 / 11)))
    assert sum(lengths) == 11 and total == pytest.approx(by_hand)
    assert judge(["unheard words", "a good unheard film"])[0] is None


def test_the_page_says_what_the_rows_say():
    rows, page = results.read("kl_control"), results.ROOT / "docs/reward_hacking.md"
    tables = {"kl_control": lambda: kl_figure.told(rows)}
    assert results.with_tables(page.read_text(), tables) == page.read_text()


def test_no_arm_differs_from_the_fixed_one_in_more_than_the_kl():
    assert all(name.startswith("kl_") for arm in kl_control.ARMS.values() for name in arm)
