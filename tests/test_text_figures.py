"""The figures by hand, and that none of them grows with the length of an ordinary text."""

import random
from itertools import pairwise

import pytest

from fastrlhf.text_figures import REPEATED_WITHIN, compression, distinct, repeated_share


def ordinary(length: int, seed: int = 0) -> list[int]:
    """Words in the shares of Zipf's law, as those of a language are."""
    shares = [1 / (rank + 1) ** 1.1 for rank in range(20_000)]
    return random.Random(seed).choices(range(20_000), shares, k=length)


def test_distinct():
    assert distinct(["funny funny funny funny"], 2) == pytest.approx(1 / 3)
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b c", "c d"], 2) == 1
    assert distinct(["a b", "a b"], 2) == 0.5
    assert distinct(["a b a"], 1) == pytest.approx(2 / 3)
    assert distinct(["a b a b a b", "c d"], 2, words=2) == 1


def test_a_text_without_pairs_repeats_none():
    assert distinct(["", "one"], 2) == 1
    assert repeated_share([1]) == repeated_share([]) == 0
    assert compression([""]) == 1


def test_the_share_in_one_window_and_in_all():
    assert repeated_share([1, 2, 1, 2, 1]) == 0.5
    for seed in range(20):
        draw = random.Random(seed)
        tokens = draw.choices(range(12), k=draw.randint(REPEATED_WITHIN - 5, 130))
        pairs = list(pairwise(tokens))
        width = min(REPEATED_WITHIN, len(pairs))
        windows = [pairs[i : i + width] for i in range(len(pairs) - width + 1)]
        shares = [1 - len(set(window)) / width for window in windows]
        assert repeated_share(tokens) == pytest.approx(sum(shares) / len(shares))


def test_ordinary_text_repeats_as_much_at_any_length():
    few = [repeated_share(ordinary(60, seed)) for seed in range(40)]
    many = repeated_share(ordinary(4000))
    assert many == pytest.approx(sum(few) / len(few), abs=0.01)
    # Counted over the whole text it would be a fifth.
    pairs = list(pairwise(ordinary(4000)))
    assert 1 - len(set(pairs)) / len(pairs) > 0.18 and many < 0.03


def test_ordinary_text_holds_as_much_at_any_length():
    ratios = [compression([" ".join(map(str, ordinary(n)))]) for n in (1000, 20_000)]
    assert ratios[1] == pytest.approx(ratios[0], rel=0.05)


@pytest.mark.parametrize("length", [250, 4000])
def test_text_that_goes_round_repeats(length):
    sentence = ordinary(12)
    assert repeated_share((sentence * length)[:length]) > 0.7
    # What goes round in more than a window is for zlib to see.
    paragraph = ordinary(150)
    round_and_round = (paragraph * length)[:4000]
    assert repeated_share(round_and_round) < 0.1
    whole, looping = (" ".join(map(str, x)) for x in (ordinary(4000), round_and_round))
    assert compression([looping]) < 0.5 * compression([whole])
