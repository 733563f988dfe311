"""Full training in bfloat16 at a learning rate of 1e-6: it moves only if rounded stochastically."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import bf16_rounding


@pytest.fixture(scope="module")
def rows():
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    made = bf16_rounding.compare(1, pretraining=30, steps=40, shape=bf16_rounding.SHAPE | shape)
    return {row["weights"]: row for row in made}


def test_to_the_nearest_it_stands_still(rows):
    assert rows["float32"]["decrease"] > 0
    assert rows["float32"]["moved"] > 0.9
    assert rows["bfloat16, to the nearest"]["moved"] < 0.05
    assert rows["bfloat16, to the nearest"]["decrease_to_float32"] < 0.2


def test_stochastically_it_learns_as_in_float32(rows):
    assert rows["bfloat16, stochastic"]["moved"] > 0.05
    assert 0.7 < rows["bfloat16, stochastic"]["decrease_to_float32"] < 1.3
