"""Each make of AdamW learns, repeats itself and is continued; the schedule is what it says."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastrlhf.config import PPOConfig
from fastrlhf.errors import UserError
from fastrlhf.optim import make_optimizer, make_schedule

CONFIG = PPOConfig(
    total_episodes=64 * 5, batch_size=64, num_ppo_epochs=2, learning_rate=1.0, warmup_steps=0
)
MAKES = ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch"]
EIGHT_BIT = MAKES[:3]


def make(parameters, optim, **changes):
    with warnings.catch_warnings():
        # Of paged_adamw_8bit, which has a test of its own.
        warnings.simplefilter("ignore")
        return make_optimizer(parameters, replace(CONFIG, optim=optim, **changes))


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


@pytest.mark.parametrize("optim", MAKES)
def test_it_learns_without_weight_decay(optim):
    torch.manual_seed(0)
    target = torch.randn(64, 128)
    parameter, untouched = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.ones(8))
    optimizer = make([parameter, untouched], optim, learning_rate=0.05)
    for _ in range(100):
        ((parameter - target).square().sum() + 0 * untouched.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (parameter - target).square().mean() < 0.05 * target.square().mean()
    assert torch.equal(untouched, torch.ones(8))
    assert {group["eps"] for group in optimizer.param_groups} == {CONFIG.adam_eps}


def moments(optimizer, parameter):
    """First and second moment as `state_dict()` names them."""
    (index,) = [i for i, p in enumerate(optimizer.param_groups[0]["params"]) if p is parameter]
    state = optimizer.state_dict()["state"][index]
    state = state.get("__bnb_optimizer_quant_state__", state)
    first, second = ("state1", "state2") if "state1" in state else ("exp_avg", "exp_avg_sq")
    return state[first], state[second]


@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_large_tensors_have_8_bit_moments_and_small_ones_float32(optim):
    large, small = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(4095))
    optimizer = make([large, small], optim)
    (large.sum() + small.sum()).backward()
    optimizer.step()
    assert {x.dtype for x in moments(optimizer, large)} == {torch.uint8}
    assert {x.dtype for x in moments(optimizer, small)} == {torch.float32}


def trained(optim, dtype, *, steps, start=None, seed=1):
    """Weights and optimizer after ``steps`` of a run of 6; ``start``: those of its beginning."""
    values = [torch.randn(80, 64, generator=torch.Generator().manual_seed(0)), torch.ones(300)]
    taken = 0
    if start is not None:
        values, state, taken = start
    parameters = [nn.Parameter(x.detach().clone().to(dtype)) for x in values]
    optimizer = make(parameters, optim, learning_rate=1e-3, seed=seed)
    if start is not None:
        optimizer.load_state_dict(state)
    for step in range(taken, steps):
        for parameter in parameters:
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    return parameters, optimizer


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


ROUND_TRIPS = [(optim, torch.float32) for optim in MAKES]
ROUND_TRIPS += [(optim, torch.bfloat16) for optim in EIGHT_BIT]


@pytest.mark.parametrize(("optim", "dtype"), ROUND_TRIPS)
def test_a_saved_state_continues_to_the_last_bit(optim, dtype):
    whole, _ = trained(optim, dtype, steps=6)
    half, optimizer = trained(optim, dtype, steps=3)
    state = copy.deepcopy(optimizer.state_dict())
    continued, _ = trained(optim, dtype, steps=6, start=(half, state, 3))
    assert same(continued, whole)
    # Without its state the same run ends elsewhere.
    state["state"] = {}
    assert not same(trained(optim, dtype, steps=6, start=(half, state, 3))[0], whole)


def test_rounding_is_a_function_of_the_seed_and_the_step():
    bits, _ = trained("adamw_8bit", torch.bfloat16, steps=4)
    torch.manual_seed(123)  # torch's own generator has no part in it
    assert same(trained("adamw_8bit", torch.bfloat16, steps=4)[0], bits)
    assert not same(trained("adamw_8bit", torch.bfloat16, steps=4, seed=2)[0], bits)


def test_paged_states_on_a_cpu_are_plain_and_say_so():
    parameter = nn.Parameter(torch.zeros(64, 64))
    with pytest.warns(UserWarning, match="on a CPU it is the same as adamw_bnb_8bit"):
        optimizer = make_optimizer([parameter], replace(CONFIG, optim="paged_adamw_8bit"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        parameter.sum().backward()
        optimizer.step()


def test_torchs_states_are_not_kept_in_16_bits():
    with pytest.raises(UserError, match="set optim to adamw_8bit"):
        make([nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))], "adamw_torch")
    with pytest.raises(UserError, match="set optim to adamw_8bit"):
        PPOConfig(optim="adamw_torch", use_peft=False, bf16=True)
    PPOConfig(optim="adamw_torch", bf16=True)  # adapters are float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64, "microbatch_tokens": 127}, "64 sequences of 2 tokens or more"),
        (
            {"batch_size": 64, "stop_token": None, "response_length": 24, "num_mini_batches": 2},
            "32 sequences of 25 tokens or more do not fit in microbatch_tokens (512)",
        ),
    ],
)
def test_what_can_never_be_one_microbatch_is_refused_with_the_configuration(changes, message):
    PPOConfig(**changes)
    with pytest.raises(UserError) as error:
        PPOConfig(optimizer_in_backward=True, **changes)
    assert message in str(error.value)
    PPOConfig(optimizer_in_backward=True, **changes | {"microbatch_tokens": 2000})


def test_a_run_that_steps_in_the_backward_is_the_same_run(tmp_path):
    """One microbatch a minibatch, clipped by the norm of all gradients: the same bits."""
    from test_trainer import lines, trainer

    runs = []
    for name, changes in (("end", {}), ("arriving", {"optimizer_in_backward": True})):
        settings = {"microbatch_tokens": 10**4, "max_grad_norm": 0.05, "learning_rate": 1e-3}
        trainer(tmp_path / name, **settings, **changes).train()
        kept = [
            {key: value for key, value in line.items() if not key.startswith("time/")}
            for line in lines(tmp_path / name)
        ]
        runs.append(kept)
    assert runs[0] == runs[1]
    assert all(line["grad_norm"] > 0.05 for line in runs[0])


def test_a_minibatch_of_several_microbatches_stops_the_run_and_names_the_settings(tmp_path):
    from test_trainer import trainer

    live = trainer(tmp_path, optimizer_in_backward=True, stop_token="eos", microbatch_tokens=40)
    before = [p.detach().clone() for p in live.backbone.trainable()]
    with pytest.raises(UserError, match="raise microbatch_tokens or num_mini_batches"):
        live.train()
    for parameter, old in zip(live.backbone.trainable(), before, strict=True):
        assert torch.equal(parameter, old)


def test_torchs_step_holds_no_temporaries():
    """Of many tensors at once it would hold some as large as all of them."""
    parameters = [torch.nn.Parameter(torch.zeros(3))]
    optimizer = make_optimizer(parameters, PPOConfig(optim="adamw_torch"))
    assert optimizer.defaults["fused"] is True
