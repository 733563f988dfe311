"""Rewards: what a function may return, and what is said when it returns something else."""

import math

import pytest

from fastrlhf.errors import UserError
from fastrlhf.rewards.functions import RewardScorer, load_reward, sentiment


def judge(function, count=2):
    return RewardScorer(function).judge(["p"] * count, ["good", "bad"][:count], [[1]] * count, [])


def test_sentiment_knows_good_from_bad():
    good, neutral, bad = sentiment(completions=["a wonderful film", "a film", "a terrible film"])
    assert good > 0.5 and neutral == 0 and bad < -0.4


def test_columns_and_ids_reach_the_function():
    seen = {}

    def reward(prompts, completions, completion_ids, answer):
        seen.update(locals())
        return [0.0, None]

    scores = RewardScorer(reward).judge(
        ["p", "q"], ["a", "b"], [[1], [2]], [{"answer": 3}, {"answer": 4}]
    )
    assert scores == [0.0, None]
    assert seen["answer"] == [3, 4] and seen["completion_ids"] == [[1], [2]]


def raises(**_):
    raise KeyError("missing")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "'raises' raised KeyError: 'missing'"),
        (lambda **_: [1.0], "returned 1 scores for 2 completions"),
        (lambda **_: [1.0, math.nan], "returned nan for completion 1 ('bad')"),
        (lambda **_: [math.inf, 1.0], "returned inf for completion 0"),
        (lambda **_: ["high", 1.0], "returned 'high' for completion 0"),
        (lambda **_: 1.0, "returned float; return a list"),
        (lambda prompts: [1.0, 1.0], "raised TypeError"),
    ],
)
def test_answers_that_cannot_be_trained_on(function, message):
    with pytest.raises(UserError) as error:
        judge(function)
    assert message in str(error.value)


def test_reward_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]"
    )
    assert judge(load_reward(f"{path}:length")) == [4.0, 3.0]
    with pytest.raises(UserError, match="no function 'lenght'; did you mean 'length'"):
        load_reward(f"{path}:lenght")
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="fails on import: ModuleNotFoundError"):
        load_reward(f"{path}:length")
    with pytest.raises(UserError, match="does not exist"):
        load_reward(f"{tmp_path}/none.py:length")
    with pytest.raises(UserError, match="did you mean 'sentiment'"):
        load_reward("sentimant")
