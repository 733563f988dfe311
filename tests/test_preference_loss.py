"""Bradley–Terry: its identities, and measures that can be counted by hand."""

import math

import pytest
import torch

from fastrlhf.comparisons import Comparison
from fastrlhf.rewards.preference_loss import (
    PreferenceStats,
    bradley_terry,
    draw_reliability,
    measure,
)


def test_only_differences_count():
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64)
    loss = bradley_terry(chosen, rejected)
    torch.testing.assert_close(loss, bradley_terry(chosen + 3, rejected + 3))
    torch.testing.assert_close(loss, -torch.sigmoid(chosen - rejected).log().mean())
    # A margin is a handicap of the better side.
    torch.testing.assert_close(
        bradley_terry(chosen, rejected, margin=0.7), bradley_terry(chosen - 0.7, rejected)
    )
    assert bradley_terry(chosen + 3, rejected + 3, center=1.0) > loss + 20


def test_no_overflow():
    loss = bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert float(loss) == 2e4


def test_centring_pulls_the_sum_to_zero():
    scores = torch.tensor([[5.0], [4.0]], requires_grad=True)
    bradley_terry(scores[0], scores[1], center=0.1).backward()
    assert scores.grad is not None and float(scores.grad.sum()) == pytest.approx(4 * 0.1 * 9)


def test_measures_by_hand():
    stats = PreferenceStats()
    stats.add(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 2.0]))
    stats.add(torch.tensor([0.5]), torch.tensor([0.5]))
    found = stats.metrics("held_out")
    assert found["held_out/accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["held_out/margin"] == pytest.approx((2 - 1 + 0) / 3)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    loss = -(math.log(sigmoid(2)) + math.log(sigmoid(-1)) + math.log(0.5)) / 3
    assert found["held_out/loss"] == pytest.approx(loss)
    error = ((1 - sigmoid(2)) + sigmoid(1) + 0) / 3
    assert found["held_out/calibration_error"] == pytest.approx(error)


def test_predictions_that_are_right_as_often_as_they_say_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(200_000, generator=generator) * 2
    won = torch.rand(200_000, generator=generator) < difference.sigmoid()
    stats = PreferenceStats()
    stats.add(torch.where(won, difference, -difference), torch.zeros(200_000))
    assert stats.calibration_error < 0.005
    sure = PreferenceStats()
    sure.add(torch.where(won, 3 * difference, -3 * difference), torch.zeros(200_000))
    assert sure.calibration_error > 0.1


def test_measure_reads_the_scores_of_the_right_texts(tmp_path):
    part = Comparison(
        torch.tensor([2, 0]), torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0])
    )
    stats = measure(torch.tensor([1.0, 9.0, 4.0]), [part, part])
    assert stats.pairs == 2 and stats.correct == 2 and stats.margin == 6
    path = draw_reliability(stats, tmp_path / "calibration.png", "Test")
    assert path.read_bytes().startswith(b"\x89PNG")
