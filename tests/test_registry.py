"""Rewards by name: sums, settings, bounds, and what is said of what cannot be read."""

import pytest

from fastrlhf.errors import UserError
from fastrlhf.rewards import answers, texts
from fastrlhf.rewards.registry import REWARDS, parse


def test_a_sum_of_rewards():
    found = parse("sentiment + 0.1*length_band(20, high=60) - repetition*2")
    assert [(x.name, x.weight) for x in found] == [
        ("sentiment", 1.0), ("length_band", 0.1), ("repetition", -2.0),
    ]  # fmt: skip
    assert found[1].function(completions=["one " * 20, "one " * 10]) == [1.0, 0.5]
    assert found[1].bounds == (0.0, 1.0)
    assert found[0].function is texts.sentiment


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("-0.5*repetition", [-0.5]),
        ("sentiment + -0.5*repetition", [1.0, -0.5]),
        ("sentiment - -0.5*repetition", [1.0, 0.5]),
        ("repetition*-2 + +3*sentiment", [-2.0, 3.0]),
        ("-repetition", [-1.0]),
    ],
)
def test_factors_may_have_a_sign(text, weights):
    assert [x.weight for x in parse(text)] == weights


def test_all_that_ships_is_registered_with_bounds_and_an_example():
    shipped = {texts: "format_match length_band repetition sentiment",
               answers: "exact_answer math_answer verified"}  # fmt: skip
    for module, names in shipped.items():
        for name in names.split():
            function = REWARDS[name]
            assert function is getattr(module, name)
            low, high = function.bounds
            assert low < high and ">>>" in function.__doc__


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentimant", "did you mean 'sentiment'"),
        ("sentiment + lenght_band", "did you mean 'length_band'"),
        ("sentiment * sentiment", "is no sum like"),
        ("sentiment(", "is no sum like"),
        ("0.5", "is no sum like"),
        ("-0.5", "is no sum like"),
        ("~2*sentiment", "is no sum like"),
        ("length_band(1, 2, 3)", "takes low, high"),
        ("length_band(width=3)", "takes low, high"),
        ("sentiment(3)", "takes no settings"),
        ("format_match", r"needs pattern: write format_match\(pattern=…\)"),
        ("length_band(sentiment)", "is no sum like"),
        ("length_band({[]: 1})", "is no sum like"),
        ("sentiment + sentiment", "names sentiment twice"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)
