"""Rollouts that teach nothing are told once, with what to change."""

from types import SimpleNamespace

import pytest
import torch
from test_trainer import lines
from test_trainer import trainer as make

from fastrlhf import PPOConfig
from fastrlhf.barren_rollouts import BarrenRollouts


def observe(scores, ended, **changes):
    told = []
    watch = BarrenRollouts(PPOConfig(response_length=24, **changes), told.append)
    rollout = SimpleNamespace(ended=torch.tensor(ended))
    for _ in range(3):
        figures = watch.observe(rollout, torch.tensor(scores))
    return figures, told


def test_responses_that_are_all_cut_off():
    figures, (told,) = observe([0.0, 1.0], [False, False])
    assert figures["val/truncated"] == 1
    assert "100% of a rollout's responses were cut off at response_length 24" in told
    assert "raise it (to 48, say)" in told
    figures, told = observe([0.0, 1.0], [True, False])
    assert figures["val/truncated"] == 0.5 and not told
    figures, told = observe([0.0, 1.0], [False, False], stop_token=None)
    assert "val/truncated" not in figures and not told


@pytest.mark.parametrize("scores", [[0.5, 0.5], [0.5, float("nan"), 0.5]])
def test_scores_that_are_all_the_same(scores):
    figures, (told,) = observe(scores, [True] * len(scores))
    assert figures["objective/scores_std"] == 0
    assert "all 2 scores of a rollout are 0.5" in told


def test_equal_scores_whose_mean_is_rounded():
    scores = [0.1] * 8
    assert torch.tensor(scores).std(correction=0) > 0
    figures, (told,) = observe(scores, [True] * 8)
    assert figures["objective/scores_std"] == 0 and "all 8 scores of a rollout are 0.1" in told


def test_scores_that_differ_or_are_alone():
    figures, told = observe([0.0, 1.0], [True, True])
    assert figures["objective/scores_std"] == 0.5 and not told
    assert not observe([1.0], [True])[1]


def test_a_run_tells_it_once(tmp_path, capsys):
    def constant(completions, **_):
        return [1.0] * len(completions)

    make(tmp_path, constant).train()
    assert capsys.readouterr().err.count("all 32 scores of a rollout are 1") == 1
    assert [line["objective/scores_std"] for line in lines(tmp_path)] == [0, 0]
