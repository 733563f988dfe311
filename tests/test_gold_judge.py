"""The gold judge is built and asked once before any weight is read, and its errors name it."""

import pytest
from test_resume import RUN, make

import fastrlhf.trainer as module
from fastrlhf import PPOConfig, UserError
from fastrlhf.rewards.functions import RewardScorer
from fastrlhf.rewards.monitor import HackingMonitor

JUDGES = """
def short(completions, **_):
    return [1.0] * (len(completions) + 1)

def broken(completions, **_):
    raise OSError("no judge today")
"""


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("{}:short", "gold: the reward 'short' returned 2 scores for 1 completions"),
        ("{}:broken", "gold: the reward 'broken' raised OSError: no judge today"),
        ("sentimant", "gold: no reward 'sentimant'.*did you mean 'sentiment'"),
    ],
)
def test_what_is_wrong_with_it_is_told_before_weights_are_read(
    tmp_path, monkeypatch, judge, message
):
    path = tmp_path / "judges.py"
    path.write_text(JUDGES)
    monkeypatch.setattr(module, "load_backbone", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        make(tmp_path, RUN, gold=judge.format(path))


def test_a_reward_model_is_asked_too():
    asked = []

    class Model:
        """As the reward's it would wait for the policy's backbone."""

        __name__ = "model"

        def share(self, backbone, tokenizer):
            raise AssertionError

        def __call__(self, prompts, **_):
            asked.append(prompts)
            return [0.0] * len(prompts)

    RewardScorer(Model()).probe(["p"], [{}])
    assert not asked
    HackingMonitor(PPOConfig(), Model()).probe(["p"], [{}])
    assert asked == [["p"]]
    HackingMonitor(PPOConfig()).probe(["p"], [{}])


def test_it_has_the_runs_time_out_and_retries():
    config = PPOConfig(
        gold="repetition", reward="sentiment + length_band", reward_timeout=7.0, reward_retries=5,
        reward_weights=[1.0, 2.0], reward_bounds=[0, 1],
    )  # fmt: skip
    kept = HackingMonitor(config).gold.settings
    assert (kept.reward_timeout, kept.reward_retries) == (7.0, 5)
    assert kept.reward_weights is kept.reward_bounds is None
