"""Rewards of the completion alone: their examples, their bounds on any text, their settings."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.errors import UserError
from fastrlhf.rewards import texts
from fastrlhf.rewards.texts import format_match, length_band, repetition, sentiment


def test_examples():
    found = doctest.testmod(texts)
    assert found.attempted >= 5 and not found.failed


@given(st.lists(st.text(max_size=60), max_size=4))
def test_scores_lie_within_the_bounds(completions):
    for function in (sentiment, length_band, repetition):
        low, high = function.bounds
        scores = function(completions=completions)
        assert len(scores) == len(completions) and all(low <= x <= high for x in scores)


def test_length_band_falls_on_either_side():
    lengths = (0, 5, 10, 40, 80, 160)
    scores = length_band(completions=["word " * n for n in lengths], low=10, high=40)
    assert scores == [0.0, 0.5, 1.0, 1.0, 0.5, 0.25]
    with pytest.raises(UserError, match="no band"):
        length_band(completions=[], low=5, high=2)


def test_repetition_counts_n_grams():
    assert repetition(completions=["a b a b a b"], n=2) == [2 / 5 - 1]
    assert repetition(completions=["a b a b a b"], n=5) == [0.0]
    assert repetition(completions=["", "one"], n=2) == [0.0, 0.0]
    with pytest.raises(UserError, match="n is at least 1"):
        repetition(completions=[], n=0)


def test_a_pattern_that_cannot_be_read():
    with pytest.raises(UserError, match="cannot be read"):
        format_match(completions=["a"], pattern="(")
    # Across lines, and of the whole text.
    assert format_match(completions=["<a>1\n2</a> "], pattern="<a>.*</a>") == [1.0]
    assert format_match(completions=["so <a>1</a>"], pattern="<a>.*</a>") == [0.0]
