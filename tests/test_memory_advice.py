"""Advice fits, nothing of it can be left out, and what cannot fit is refused."""

from dataclasses import replace
from functools import cache

import pytest
import tiny

from fastrlhf import memory_advice
from fastrlhf.config import PPOConfig
from fastrlhf.errors import UserError
from fastrlhf.memory import MemoryPlan
from fastrlhf.memory_advice import STEPS, Change, automatic, fit

CONFIG = PPOConfig(
    batch_size=8, total_episodes=8, response_length=8, train_layers=2, microbatch_tokens=64,
    eval_prompts=4, workspace_mb=1,
)  # fmt: skip
PROMPT = 6


def fake_plans(monkeypatch):
    """Plans of a formula instead of a simulation: advice is tried out in no time."""

    @cache
    def planned(config, prompt_length):
        layers = 4 if config.train_layers == "all" else config.train_layers
        bits = {None: 16, "int8": 8, "nf4": 4}[config.quantization]
        activations = config.microbatch_tokens * layers
        activations //= 4 if config.gradient_checkpointing else 1
        update = 1000 * bits + activations + config.batch_size * config.response_length
        return MemoryPlan("tiny", "cpu", prompt_length, {}, {"update": update})

    def stand_in(config, *, model_config, device, prompt_length):
        return planned(config, prompt_length)

    monkeypatch.setattr(memory_advice, "plan", stand_in)
    return planned


@pytest.mark.parametrize("budget", [16700, 16320, 16150, 12000, 8150, 4120, 4030])
def test_advice_fits_and_no_change_of_it_can_be_left_out(budget, monkeypatch):
    planned = fake_plans(monkeypatch)
    config = replace(CONFIG, train_layers="all", microbatch_tokens=256)
    found = fit(config, budget, model_config=tiny.config(), device="cpu", prompt_length=PROMPT)
    assert found.changes
    changed = replace(config, **{x.setting: x.value for x in found.changes})
    assert changed == found.config and planned(changed, PROMPT).fits(budget)
    assert [x.setting for x in found.changes] == [
        x for x in STEPS if x in {c.setting for c in found.changes}
    ]
    for left_out in found.changes:
        others = {x.setting: x.value for x in found.changes if x != left_out}
        assert not planned(replace(config, **others), PROMPT).fits(budget)


def three_phases(config, prompt_length):
    length = prompt_length + config.response_length
    bits = {None: 16, "int8": 8, "nf4": 4}[config.quantization]
    phases = {"rollout": config.batch_size * length, "update": config.microbatch_tokens * 2}
    if config.eval_prompts > config.batch_size:
        phases["evaluate"] = config.eval_prompts * length
    phases = {name: 100 * bits + count for name, count in phases.items()}
    return MemoryPlan("tiny", "cpu", prompt_length, {}, phases)


@pytest.mark.parametrize("budget", [2300, 2100, 1500, 600, 470])
def test_a_smaller_batch_is_evaluated_on_fewer_prompts(budget, monkeypatch):
    monkeypatch.setattr(
        memory_advice,
        "plan",
        lambda config, *, model_config, device, prompt_length: three_phases(config, prompt_length),
    )
    given = {"model_config": tiny.config(), "device": "cpu", "prompt_length": PROMPT}
    config = replace(CONFIG, batch_size=64, eval_prompts=64, total_episodes=64)
    before = three_phases(config, PROMPT).needed
    found = fit(config, budget, **given)
    assert found.plan.fits(budget) and found.config.batch_size == found.config.eval_prompts
    assert found.config == replace(config, **{x.setting: x.value for x in found.changes})
    assert sum(x.saves for x in found.changes) == before - found.plan.needed
    for left_out in found.changes:
        others = {x.setting: x.value for x in found.changes if x != left_out}
        assert not three_phases(replace(config, **others), PROMPT).fits(budget)
    # Once the batch is small the update is the peak: its microbatch is worth cutting then.
    least = "microbatch_tokens=14 eval_prompts=1 quantization=nf4 batch_size=1$"
    with pytest.raises(UserError, match=f"at least .*, with {least}"):
        fit(config, 300, **given)


def test_what_a_later_change_overshoots_is_taken_back_in_part(monkeypatch):
    """NF4 was not enough, and the halved batch leaves room for int8."""

    def planned(config, *, model_config, device, prompt_length):
        bits = {None: 16, "int8": 8, "nf4": 4}[config.quantization]
        return MemoryPlan("tiny", "cpu", 6, {}, {"update": 100 * bits + 150 * config.batch_size})

    monkeypatch.setattr(memory_advice, "plan", planned)
    given = {"model_config": tiny.config(), "device": "cpu", "prompt_length": PROMPT}
    found = fit(CONFIG, 1500, **given)
    assert {x.setting: x.value for x in found.changes} == {"quantization": "int8", "batch_size": 4}
    assert sum(x.saves for x in found.changes) == 1600 + 1200 - 1400


def test_a_card_gives_a_process_less_than_it_is_sold_with(monkeypatch):
    gib = 2**30

    def planned(config, *, model_config, device, prompt_length):
        whole = 14.5 if config.quantization is None else 9
        peak = int((whole - 0.5) / 1.04 * gib)
        return MemoryPlan("tiny", device, 6, {}, {"update": peak})

    monkeypatch.setattr(memory_advice, "plan", planned)
    given = {"model_config": tiny.config(), "prompt_length": PROMPT}
    # 15 GiB of 16, 13.1 of 14.
    assert not fit(CONFIG, 16 * gib, device="cuda", **given).changes
    (change,) = fit(CONFIG, 14 * gib, device="cuda", **given).changes
    assert str(change) == "quantization=int8"
    table = planned(CONFIG, model_config=None, device="cuda", prompt_length=6).table(14 * gib)
    assert "of 14.00 GB, 896 MB is reserved for the driver" in table
    assert "512 MB of context and 4% of gaps" in table and "too much" in table
    # What is said to be enough is enough.
    with pytest.raises(UserError, match=r"give at least 9\.6\d GB"):
        fit(CONFIG, 9 * gib, device="cuda", **given)
    assert fit(CONFIG, int(9.62 * gib), device="cuda", **given).plan.needed <= 9 * gib


def test_a_budget_below_the_minimum_is_refused_with_one_that_would_do(monkeypatch):
    fake_plans(monkeypatch)
    given = {"model_config": tiny.config(), "device": "cpu", "prompt_length": PROMPT}
    with pytest.raises(UserError, match=r"is too little for .*: give at least .* quantization=nf4"):
        fit(CONFIG, 4000, **given)


def test_automatic_grows_the_microbatch_or_picks_what_fits(monkeypatch):
    fake_plans(monkeypatch)
    given = {"model_config": tiny.config(), "device": "cpu", "prompt_length": PROMPT}
    assert automatic(CONFIG, 10**6, **given).config.microbatch_tokens == 8 * 14
    picked = automatic(CONFIG, 8300, **given)
    assert picked.config.quantization == "int8" and picked.plan.fits(8300)


def test_changes_are_spelt_as_in_a_recipe():
    pairs = [("bf16", True), ("quantization", "nf4"), ("batch_size", 8)]
    spelt = [str(Change(*pair, saves=0)) for pair in pairs]
    assert spelt == ["bf16=true", "quantization=nf4", "batch_size=8"]
