"""What adapts moves the right way, settles, and comes back from a checkpoint."""

import json

import pytest

from fastrlhf.config import PPOConfig
from fastrlhf.configs import ReinforceConfig
from fastrlhf.controllers import AlgorithmState, KLController, MovingAverage, PenaltyController


def test_the_kl_controller_moves_towards_its_target():
    """Ziegler et al. 2019: in proportion to the error, which counts for at most a fifth."""
    for kl, factor in ((6.0, 1), (6.6, 1.001), (60.0, 1.002), (5.4, 0.999), (0.0, 0.998)):
        controller = KLController(0.15, target=6.0, horizon=10000)
        controller.update(kl, episodes=100)
        assert controller.coef == pytest.approx(0.15 * factor), kl


def test_a_fixed_coefficient_stays():
    controller = KLController(0.15)
    controller.update(100.0, episodes=10**6)
    assert controller.coef == 0.15


@pytest.mark.parametrize("start", [0.01, 2.0])
def test_the_kl_settles_at_the_target(start):
    """In a process whose KL creeps towards a level that falls as the weight rises."""
    controller, kl = KLController(start, target=6.0, horizon=1000), 0.0
    path = []
    for _ in range(600):
        kl += 0.2 * (1.2 / controller.coef - kl)
        controller.update(kl, episodes=64)
        path.append(kl)
    assert controller.coef == pytest.approx(0.2, rel=0.02)
    assert all(kl == pytest.approx(6.0, rel=0.02) for kl in path[-50:])


def test_the_penalty_doubles_and_halves():
    for kl, factor in ((0.016, 2), (0.014, 1), (0.007, 1), (0.006, 0.5)):
        controller = PenaltyController(3.0, target=0.01)
        controller.update(kl)
        assert controller.coef == 3.0 * factor, kl


def test_the_moving_average_starts_unbiased_and_converges():
    average = MovingAverage(0.9)
    assert average.value == 0
    average.update(5.0)
    assert average.value == pytest.approx(5.0)
    for _ in range(200):
        average.update(2.0)
    assert average.value == pytest.approx(2.0, rel=1e-6)


def test_the_state_comes_back():
    config = ReinforceConfig(kl_controller="adaptive", baseline="moving_average")
    state, other = AlgorithmState.of(config), AlgorithmState.of(config)
    state.kl.update(60.0, 64)
    state.old_kl.update(1.0)
    state.returns.update(3.0)
    assert other.state_dict() != state.state_dict()
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert other.state_dict() == state.state_dict()
    assert (other.kl.coef, other.returns.value) == (state.kl.coef, state.returns.value)


def test_the_configuration_chooses():
    assert AlgorithmState.of(PPOConfig(kl_target=3.0)).kl.target is None
    adaptive = AlgorithmState.of(PPOConfig(kl_controller="adaptive", kl_target=3.0)).kl
    assert (adaptive.target, adaptive.coef) == (3.0, 0.05)
