"""The optimizer's states are 8-bit, and the schedule is what its name says."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastrlhf.config import PPOConfig
from fastrlhf.optim import make_optimizer, make_schedule

CONFIG = PPOConfig(
    total_episodes=64 * 5, batch_size=64, num_ppo_epochs=2, learning_rate=1.0, warmup_steps=0
)


def rates(config):
    optimizer = make_optimizer([nn.Parameter(torch.zeros(4))], config)
    schedule = make_schedule(optimizer, config)
    seen = []
    for _ in range(config.optimizer_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_linear_falls_to_zero_over_the_run():
    assert rates(CONFIG) == pytest.approx([1 - i / 10 for i in range(10)])


def test_constant_after_warm_up():
    config = replace(CONFIG, lr_scheduler_type="constant", warmup_steps=4)
    assert rates(config) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_large_tensors_have_8_bit_moments_and_learn():
    torch.manual_seed(0)
    target = torch.randn(64, 128)
    parameter = nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer([parameter], replace(CONFIG, learning_rate=0.05))
    for _ in range(100):
        (parameter - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (parameter - target).square().mean() < 0.05 * target.square().mean()
    state = optimizer.state[parameter]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
