"""Win rates and their intervals: identities, and coverage where the truth is known."""

import pytest
import torch

from fastrlhf import comparison
from fastrlhf.comparison import bootstrap, compare, mean_interval


def test_ties_count_half_and_a_model_against_itself_wins_half():
    assert compare([1, 1, 0, 2], [0, 1, 1, 2]).win_rate.value == 0.5
    own = compare([0.1, 0.7, -3], [0.1, 0.7, -3])
    assert (own.win_rate.value, own.win_rate.low, own.win_rate.high) == (0.5, 0.5, 0.5)
    assert own.difference.low == own.difference.high == 0


def test_sides_swapped():
    a, b = [0.3, 1.0, -1.0, 2.0, 0.0], [0.1, 2.0, -2.0, 2.0, -1.0]
    there, back = compare(a, b), compare(b, a)
    assert there.win_rate.value == pytest.approx(1 - back.win_rate.value)
    assert there.win_rate.low == pytest.approx(1 - back.win_rate.high)
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.policy == back.reference


def test_prompts_that_one_was_not_judged_on_are_left_out():
    found = compare([1, None, 3, 0], [0, 0, None, 1])
    assert found.prompts == 2 and found.win_rate.value == 0.5 and found.policy.value == 0.5
    with pytest.raises(ValueError):
        compare([None], [1.0])


def test_pairs_stay_together():
    """The prompts differ far more than the models: only a paired interval sees the difference."""
    hard = torch.linspace(-10, 10, 50).tolist()
    found = compare([x + 0.5 + 0.1 * (i % 3) for i, x in enumerate(hard)], hard)
    assert 0.4 < found.difference.low < found.difference.high < 0.8
    assert found.policy.high - found.policy.low > 2


def test_coverage():
    """The interval of a mean of 40 holds the truth about 95 times in 100."""
    torch.manual_seed(0)
    held = 0
    for _ in range(200):
        interval = mean_interval(torch.randn(40).tolist())
        held += interval.low <= 0 <= interval.high
    assert 0.90 <= held / 200 <= 0.985


def test_the_same_seed_gives_the_same_interval():
    values = torch.randn(30, 1).double()
    assert bootstrap(values, 1) == bootstrap(values, 1) != bootstrap(values, 2)


def test_many_prompts_are_drawn_in_parts(monkeypatch):
    """Parts are the same draws; 10,000 prompts at once were 900 MiB."""
    values = torch.randn(50, 2).double()
    whole = bootstrap(values, 1)
    monkeypatch.setattr(comparison, "HELD", 150)
    for part, one in zip(bootstrap(values, 1), whole, strict=True):
        assert (part.low, part.high) == pytest.approx((one.low, one.high), rel=1e-12)
    monkeypatch.undo()
    shapes = []
    real = torch.randint
    monkeypatch.setattr(
        comparison.torch, "randint", lambda n, shape, **_: shapes.append(shape) or real(n, shape)
    )
    bootstrap(torch.zeros(10_000, 1).double(), 0)
    assert max(a * b for a, b in shapes) <= 2**20 and sum(a for a, _ in shapes) == 4000
