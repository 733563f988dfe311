"""Rewards: what a function may return, and what is said when it returns something else."""

import json
import math
import pickle
import statistics
import sys
from dataclasses import replace

import pytest
import torch

from fastrlhf.errors import UserError
from fastrlhf.reward_settings import RewardSettings
from fastrlhf.rewards.functions import RewardScorer, load_reward, sentiment
from fastrlhf.types import Prompts


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
    for several in ("sentiment + 0.1*length_band(20, 60)", "0.5*sentiment", "-repetition"):
        with pytest.raises(UserError, match=r"gives one function; call load_objectives\("):
            load_reward(several)


def test_a_file_takes_no_other_modules_name(tmp_path):
    source = (
        "from dataclasses import dataclass\n\n@dataclass\nclass Case:\n    x: int\n\n"
        "def f(completions, **_):\n    return [{}] * len(completions)\n"
    )
    found = []
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "statistics.py"
        path.write_text(source.format(float(number)))
        found.append(load_reward(f"{path}:f"))
    assert sys.modules["statistics"] is statistics
    assert [judge(pickle.loads(pickle.dumps(f)), 1) for f in found] == [[0.0], [1.0]]
    case = sys.modules[found[0].__module__].Case(3)
    assert pickle.loads(pickle.dumps(case)) == case
    before = set(sys.modules)
    broken = tmp_path / "my.own.py"
    broken.write_text("raise ValueError('no')\n")
    with pytest.raises(UserError, match="fails on import: ValueError: no"):
        load_reward(f"{broken}:f")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("def length(**_): ...\ndef _inner(): ...\n", "length"),
        ("def f(**_): ...\nasync def g(**_): ...\n", r"function \(it has f, g\)"),
        ("", r"function \(it has none\)"),
        ("def f(\n", "function"),
        (None, "function"),
    ],
)
def test_a_file_without_its_function(tmp_path, monkeypatch, source, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards").mkdir()
    for path in ("mine.py", "rewards/mine.py"):
        if source is not None:
            (tmp_path / path).write_text(source)
        with pytest.raises(UserError, match=f"'{path}' is a file: write {path}:{hint}$"):
            load_reward(path)


class FakeRollout:
    """As much of a rollout as a scorer reads."""

    def __init__(self, completions):
        self.completions = completions
        self.tokens = torch.zeros(len(completions), 1)
        self.prompts = Prompts(
            ["p"] * len(completions), self.tokens, self.tokens.bool(), [{}] * len(completions)
        )

    def completion_ids(self):
        return [[1]] * len(self.completions)


def length(completions, **_):
    return [float(len(x)) for x in completions]


def test_a_sum_is_scored_and_shown_by_objective():
    scorer = RewardScorer([length, "0.5*repetition"], RewardSettings())
    rollout = FakeRollout(["a a a", "b"])
    assert scorer(rollout).tolist() == [5 - 0.25, 1.0]
    assert scorer.take_metrics() == {}  # evaluations do not count
    assert scorer.train(rollout).tolist() == [5 - 0.25, 1.0]
    scorer.train(FakeRollout(["cccc"]))
    assert scorer.take_metrics() == {
        "reward/length": pytest.approx(10 / 3),
        "reward/repetition": pytest.approx(-0.5 / 3),
    }
    assert scorer.take_metrics() == {}
    assert scorer.name == "length + repetition"
    # Whatever a function is called, the trainer's own figures stay.
    scorer = RewardScorer([length, lambda completions, **_: [0.0] * len(completions)])
    scorer.objectives[1] = replace(scorer.objectives[1], name="kl")
    scorer.train(rollout)
    assert scorer.take_metrics() == {"reward/length": 3.0, "reward/kl": 0.0}
    # One objective as it is says nothing that objective/scores does not.
    plain = RewardScorer(length)
    plain.train(rollout)
    assert plain.take_metrics() == {}


def test_weights_take_the_place_of_those_in_the_sum():
    settings = RewardSettings(reward_weights=[2.0, -1.0])
    scorer = RewardScorer([length, lambda completions, **_: [1.0] * len(completions)], settings)
    assert scorer(FakeRollout(["ab"])).tolist() == [3.0]
    with pytest.raises(UserError, match="2 weights for 1 objectives"):
        RewardScorer(length, settings)(FakeRollout(["ab"]))


def test_a_function_may_return_several_objectives():
    def both(completions, **_):
        return torch.tensor([[len(x), -1.0] for x in completions])

    scorer = RewardScorer(both, RewardSettings(reward_weights=[1.0, 10.0]))
    assert scorer.train(FakeRollout(["ab", "abc"])).tolist() == [-8.0, -7.0]
    assert scorer.take_metrics() == {"reward/both[0]": 2.5, "reward/both[1]": -1.0}
    both.objectives = ("length", "cost")
    scorer = RewardScorer(both)
    scorer(FakeRollout(["ab"]))
    assert scorer.names == ["length", "cost"]
    both.objectives = ("length",)
    with pytest.raises(UserError, match="names 1 objectives and returned 2"):
        RewardScorer(both)(FakeRollout(["ab"]))
    with pytest.raises(UserError, match="1 and 2 scores a completion"):
        RewardScorer(lambda **_: [[1.0], [1.0, 2.0]])(FakeRollout(["a", "b"]))


def test_an_objective_that_does_not_judge_adds_nothing():
    def picky(completions, **_):
        return [None if x == "skip" else 1.0 for x in completions]

    def skips(completions, **_):
        return [None for _ in completions]

    scores = RewardScorer([picky, length])(FakeRollout(["skip", "ab"])).tolist()
    assert scores == [4.0, 3.0]
    assert math.isnan(RewardScorer([picky, skips])(FakeRollout(["skip"])).item())


def test_scores_beyond_the_bounds():
    with pytest.raises(UserError, match=r"returned 3 for completion 0 \('abc'\), outside .*\[0, 2"):
        RewardScorer(length, RewardSettings(reward_bounds=[0, 2]))(FakeRollout(["abc"]))
    length.bounds = (0.0, 1.0)
    try:
        with pytest.raises(UserError, match="outside of its bounds"):
            RewardScorer(length)(FakeRollout(["abc"]))
        # What the run says goes.
        RewardScorer(length, RewardSettings(reward_bounds=[0, 9]))(FakeRollout(["abc"]))
    finally:
        del length.bounds


def test_scaling_goes_on_where_it_was():
    settings = RewardSettings(reward_normalization="running", reward_clip=1.5)
    whole, first = RewardScorer(length, settings), RewardScorer(length, settings)
    rollouts = [FakeRollout(["a" * n for n in sizes]) for sizes in ((1, 4, 9), (2, 30), (5, 6))]
    for scorer in (whole, first):
        scorer.train(rollouts[0])
        scorer.train(rollouts[1])
    second = RewardScorer(length, settings)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.train(rollouts[2]).equal(whole.train(rollouts[2]))
    # Evaluations see the scores as they are.
    assert whole(rollouts[0]).tolist() == [1.0, 4.0, 9.0]


def test_two_of_one_name():
    with pytest.raises(UserError, match="two rewards are named 'length'"):
        RewardScorer([length, length])


def test_reward_models_are_shared_where_they_can_be():
    class Model:
        __name__ = "model"
        backbone = None

        def share(self, backbone, tokenizer):
            if backbone == "other":
                raise UserError("another base")
            self.backbone = backbone

        def __call__(self, completions, **_):
            raise AssertionError("not called before it has a backbone")

    said = []
    for setting, backbone, expected in (
        ("auto", "same", "same"), ("auto", "other", None), ("own", "same", None),
    ):  # fmt: skip
        model = Model()
        scorer = RewardScorer(model, RewardSettings(reward_backbone=setting))
        scorer.probe(["p"], [{}])
        scorer.share(backbone, None, said.append)
        assert model.backbone == expected
    assert said == ["the reward model has a base of its own: another base"]
    with pytest.raises(UserError, match="another base"):
        RewardScorer(Model(), RewardSettings(reward_backbone="shared")).share("other", None)


def test_an_answer_of_none_alone_has_as_many_columns_as_the_others():
    judging = True

    def both(completions, **_):
        return [[1.0, 2.0] if judging else None for _ in completions]

    scorer = RewardScorer([both, length], RewardSettings(reward_normalization="running"))
    scorer.train(FakeRollout(["ab", "abc"]))
    judging = False
    assert scorer.table(FakeRollout(["ab"])).shape == (1, 3)
    assert not scorer.train(FakeRollout(["ab"])).isnan().any()
    # A resumed run knows it too.
    resumed = RewardScorer([both, length])
    resumed.load_state_dict(json.loads(json.dumps(scorer.state_dict())))
    assert resumed.table(FakeRollout(["ab"])).shape == (1, 3)
    # Before the first judgement: what is declared, or as many as weights.
    weighted = RewardScorer(both, RewardSettings(reward_weights=[1.0, 2.0]))
    assert weighted(FakeRollout(["ab"])).isnan().all()
    both.objectives = ("one", "two")
    assert RewardScorer(both)(FakeRollout(["ab"])).isnan().all()


def test_moments_begin_with_the_first_judgement():
    answers = iter([[None, None], [[1.0, 2.0], [3.0, 5.0]]])
    scorer = RewardScorer(lambda **_: next(answers), RewardSettings(reward_normalization="running"))
    assert scorer.train(FakeRollout(["a", "b"])).isnan().all()
    assert not scorer.train(FakeRollout(["a", "b"])).isnan().any()


def test_columns_do_not_change_what_a_reward_was_set_to():
    scorer = RewardScorer("length_band(1, 2)")
    assert scorer.judge(["p"], ["one two"], [[1]], [{"low": 50, "high": 60}]) == [1.0]
    # Nor what it was left at.
    assert RewardScorer("repetition").judge(["p"], ["one two"], [[1]], [{"n": "three"}]) == [0.0]
    for name in ("prompts", "completions", "completion_ids"):
        with pytest.raises(UserError, match=f"has a column '{name}'.*rename it"):
            scorer.judge(["p"], ["one two"], [[1]], [{name: 1}])


def test_a_folder_does_not_hide_a_shipped_reward(tmp_path, monkeypatch):
    (tmp_path / "sentiment").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_reward("sentiment") is sentiment


def test_a_folder_that_is_not_there():
    for name in ("/nowhere/runs/reward", "runs/reward/model"):
        with pytest.raises(UserError, match=f"no folder '{name}'"):
            load_reward(name)
