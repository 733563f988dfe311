"""Every way of taking a step clips alike, steps alike, and refuses before weights have changed."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrlhf.config import PPOConfig
from fastrlhf.errors import SelfCheckError, UserError
from fastrlhf.optim import make_optimizer, make_schedule
from fastrlhf.step import NonFiniteStep, Updater, gradient_norm

CONFIG = PPOConfig(learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=1e9)
WAYS = [
    {"optimizer_in_backward": in_backward, "grad_clip": clip}
    for in_backward, clip in product((False, True), ("norm", "per_parameter"))
]
IN_BACKWARD = WAYS[2:]


def name(way):
    return f"{'arriving' if way['optimizer_in_backward'] else 'end'}-{way['grad_clip']}"


ways = pytest.mark.parametrize("way", WAYS, ids=name)
in_backward_ways = pytest.mark.parametrize("way", IN_BACKWARD, ids=name)


class Part(NamedTuple):
    loss: Tensor

    def detached(self):
        return Part(self.loss.detach())


class Net(nn.Module):
    """A tied weight, one without a gradient, frozen ones, and some large enough for 8-bit codes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 80)
        self.middle = nn.Linear(80, 80)
        self.frozen = nn.Linear(80, 80).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(5))
        self.to(dtype)

    def forward(self, tokens):
        hidden = self.frozen(self.middle(self.embedding(tokens)).tanh())
        return hidden @ self.embedding.weight.t()


TOKENS = torch.randint(64, (12,), generator=torch.Generator().manual_seed(1))


def loss_of(model, tokens=TOKENS, scale=1.0):
    logits = model(tokens).float()
    return Part(scale * nn.functional.cross_entropy(logits, tokens.roll(1), reduction="sum"))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def updater(model, way, **changes):
    config = replace(CONFIG, **way | changes)
    optimizer = make_optimizer(trained(model), config)
    return Updater(optimizer, make_schedule(optimizer, config), config)


def weights(model):
    return [p.detach().clone() for p in trained(model)]


def plain_gradients(model):
    loss_of(model).loss.backward()
    return {p: p.grad for p in trained(model) if p.grad is not None}


class Taker(torch.optim.Optimizer):
    """Takes no step: it keeps the gradients that it was to step by."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1.0})
        self.taken = {}

    def step(self, closure=None):
        self.taken |= {
            p: p.grad.clone() for p in self.param_groups[0]["params"] if p.grad is not None
        }


@pytest.mark.parametrize("bound", [0.5, 1e4], ids=["clips", "does not"])
@ways
def test_clipping_is_that_of_torch(way, bound):
    twin, model = Net(), Net()
    gradients = plain_gradients(twin)
    whole = torch.nn.utils.get_total_norm(gradients.values())
    assert all(0.5 < g.norm() < 1e4 for g in gradients.values())
    together = way["grad_clip"] == "norm"
    for group in [list(gradients)] if together else [[p] for p in gradients]:
        torch.nn.utils.clip_grad_norm_(group, bound)
    config = replace(CONFIG, max_grad_norm=bound, **way)
    optimizer = Taker(trained(model))
    live = Updater(optimizer, make_schedule(optimizer, config), config)
    _, norm = live.update([lambda: loss_of(model)])
    assert len(optimizer.taken) == len(gradients) == 3
    for ours, p in zip(trained(model), trained(twin), strict=True):
        if p in gradients:
            torch.testing.assert_close(optimizer.taken[ours], p.grad, rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(norm, whole, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("optim", "dtype"),
    [
        ("adamw_8bit", torch.float32),
        ("adamw_8bit", torch.bfloat16),
        ("adamw_bnb_8bit", torch.bfloat16),
        ("adamw_torch", torch.float32),
    ],
)
@in_backward_ways
def test_in_the_backward_it_is_the_ordinary_step_bit_for_bit(way, optim, dtype):
    # Only "norm" clips the same thing in both; per_parameter is the same where nothing is clipped.
    bound = 0.5 if way["grad_clip"] == "norm" else 1e9
    ends = []
    for each in ({}, way):
        model = Net(dtype)
        live = updater(model, each, optim=optim, max_grad_norm=bound)
        norms = [live.update([lambda: loss_of(model)])[1] for _ in range(3)]  # noqa: B023
        ends.append([*weights(model), *norms])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    named = [n for n, p in Net().named_parameters() if p.requires_grad]
    both = zip(named, ends[0], weights(Net(dtype)), strict=False)
    moved = {n for n, a, b in both if not torch.equal(a, b)}
    assert moved == set(named) - {"unused"}


@ways
def test_a_step_repeats_itself(way):
    ends = []
    for _ in range(2):
        model = Net(torch.bfloat16)
        live = updater(model, way, max_grad_norm=0.5)
        for _ in range(3):
            live.update([lambda: loss_of(model)])  # noqa: B023
        ends.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@in_backward_ways
def test_one_gradient_is_there_at_a_time(way):
    model, present, calls = Net(), [], []
    live = updater(model, way)

    def watch(parameter):
        calls.append(parameter)
        present.append(sum(p.grad is not None for p in model.parameters()))

    gradients = []

    def loss():
        gc.collect()
        # What a pass left behind would still be alive when the next one begins.
        assert not [r for r in gradients if r() is not None]
        return loss_of(model)

    # Hooks run in the order in which they are registered: this one before the updater's.
    for p in trained(model):
        p.register_post_accumulate_grad_hook(watch)
        p.register_post_accumulate_grad_hook(lambda p: gradients.append(weakref.ref(p.grad)))
    live.update([loss])
    assert not [r for r in gradients if r() is not None]
    passes = 2 if way["grad_clip"] == "norm" else 1
    assert present == [1] * len(calls) and len(calls) == 3 * passes
    assert all(p.grad is None for p in model.parameters())
    # At the end of the backward there are three: the measure can see more than one.
    present.clear()
    updater(model, WAYS[0]).update([lambda: loss_of(model)])
    assert max(present) == 3


@ways
def test_microbatches_add_up_or_are_refused(way):
    model, whole = Net(), Net()
    halves = [partial(loss_of, model, part) for part in (TOKENS[:6], TOKENS[6:])]
    live = updater(model, way, max_grad_norm=0.5)
    before = weights(model)
    if way["optimizer_in_backward"]:
        calls = []
        refused = [partial(calls.append, i) for i in range(2)]
        with pytest.raises(UserError, match="this one has 2; raise microbatch_tokens"):
            live.update(refused)
        assert not calls
        assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
        return
    parts, _ = live.update(halves)
    assert len(parts) == 2 and not any(part.loss.requires_grad for part in parts)

    def together():
        first, second = (loss_of(whole, part).loss for part in (TOKENS[:6], TOKENS[6:]))
        return Part(first + second)

    updater(whole, way, max_grad_norm=0.5).update([together])
    for ours, other in zip(weights(model), weights(whole), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@ways
def test_a_gradient_that_is_not_finite_is_refused(way, bad):
    model = Net()
    live = updater(model, way)
    before = weights(model)
    with pytest.raises(NonFiniteStep, match=f"the loss is {bad}"):
        live.update([lambda: loss_of(model, scale=bad)])
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert live.schedule.last_epoch == 0
    assert live.can_repeat == (not way["optimizer_in_backward"])
    # The hooks are gone: a backward of someone else's steps nothing.
    loss_of(model).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    # Nor does what it left take part in the next step, which is as if nothing had been.
    live.update([lambda: loss_of(model)])
    fresh = Net()
    updater(fresh, way).update([lambda: loss_of(fresh)])
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(fresh), strict=True))


def test_a_bad_gradient_late_in_the_backward():
    """Clipped one by one, weights of later layers are stepped by then; the message says so."""

    def broken(way):
        model = Net()
        model.embedding.weight.register_hook(lambda gradient: gradient * torch.nan)
        before = weights(model)
        live = updater(model, way)
        live.names = {model.embedding.weight: "the embedding"}
        with pytest.raises(SelfCheckError, match="the gradient of the embedding") as error:
            live.update([lambda: loss_of(model)])
        assert isinstance(error.value, NonFiniteStep) != (name(way) == "arriving-per_parameter")
        after = weights(model)
        return str(error.value), [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]

    names = [n for n, p in Net().named_parameters() if p.requires_grad]
    for way in WAYS:
        message, moved = broken(way)
        stepped = {n for n, m in zip(names, moved, strict=True) if m}
        if name(way) == "arriving-per_parameter":
            assert stepped == {"middle.weight", "middle.bias"}
            assert "are stepped already, so this step cannot be skipped; set grad_clip" in message
        else:
            assert not stepped and "stepped already" not in message


@ways
def test_a_check_comes_before_the_step(way):
    model, seen = Net(), []
    before = weights(model)

    def check(parts):
        seen.append([float(part.loss) for part in parts])
        raise SelfCheckError("no")

    with pytest.raises(SelfCheckError, match="no"):
        updater(model, way).update([lambda: loss_of(model)], check)
    assert seen == [[float(loss_of(model).loss.detach())]]
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@in_backward_ways
def test_a_language_model_with_checkpoints(way, lora):
    """Its embedding is its head; with LoRA only the adapters train."""
    from peft import LoraConfig, get_peft_model

    tokens = torch.randint(28, (3, 12), generator=torch.Generator().manual_seed(2))

    def make(checkpointing):
        model = tiny.model()
        layers = model.get_decoder().layers
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for layer in layers if checkpointing else []:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return model

    ends = []
    for each, checkpointing in (({}, False), (way, False), (way, True)):
        model = make(checkpointing)
        bound = 0.5 if way["grad_clip"] == "norm" else 1e9
        live = updater(model, each, max_grad_norm=bound)
        before = weights(model)
        for _ in range(2):
            live.update([lambda: Part(model(input_ids=tokens, labels=tokens).loss)])  # noqa: B023
        ends.append(weights(model))
    assert any(not torch.equal(a, b) for a, b in zip(ends[0], before, strict=True))
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(end, ends[0], strict=True))


@in_backward_ways
def test_a_weight_that_is_read_after_its_step_is_refused(way):
    """Kernels write weights behind autograd's back: the new value would be taken for the old."""
    model = Net()

    def loss():
        start = model.embedding(TOKENS)
        # The detached use is further down than the one that brings the gradient.
        return Part(model.middle((start @ model.middle.weight.detach()).tanh()).square().sum())

    live = updater(model, way)
    before = model.embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        live.update([loss])
    assert torch.equal(model.embedding.weight, before)


@in_backward_ways
def test_a_gradient_in_two_parts_is_refused(way):
    model = Net()

    def loss():
        hidden = model.embedding(TOKENS)
        for _ in range(2):
            hidden = checkpoint(model.middle, hidden, use_reentrant=True)
        return Part(hidden.square().sum())

    with pytest.raises(SelfCheckError, match="arrived in two parts"):
        updater(model, way).update([loss])


def test_the_norm_of_many_numbers_is_right_and_makes_no_copy():
    x = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    for given in (x, x.bfloat16(), x[:3_000_000].view(1500, 2000).t(), x[:7], x[:0]):
        exact = given.double().norm()
        torch.testing.assert_close(gradient_norm(given).double(), exact, rtol=1e-5, atol=0)
    # bfloat16's own norm is bfloat16.
    assert gradient_norm(x.bfloat16()).dtype == torch.float32
