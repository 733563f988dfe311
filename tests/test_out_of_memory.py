"""A step that does not fit is taken again in smaller parts; of the first try nothing is left."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from test_trainer import FAST, lines, trainer

import fastrlhf.trainer as module
from fastrlhf import UserError
from fastrlhf.microbatches import Sequences, cut
from fastrlhf.out_of_memory import MicrobatchBudget, is_out_of_memory
from fastrlhf.step import Updater

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
]
# Of a microbatch: 32 sequences of 9 tokens make a minibatch of 16 or a batch of 32.
FITS = 40


class SmallMemory:
    """A backbone whose forwards or backwards fail on more than ``FITS`` tokens."""

    def __init__(self, backbone, monkeypatch, where, error=ERRORS[0], fits=FITS):
        self.error, self.fits, self.failed, self.alive = error, fits, 0, []
        self.seen: list[int] = []
        self.hidden, self.together = backbone.hidden, backbone.hidden_together
        if where == "score":
            monkeypatch.setattr(backbone, "hidden_together", self.score)
        else:
            monkeypatch.setattr(backbone, "hidden", self.update)
        self.where = where

    def score(self, roles, trunk, *inputs):
        self.check_that_the_last_try_is_gone()
        found = self.together(roles, trunk, *inputs)
        self.note(trunk, *found.values())
        return found

    def update(self, role, trunk, *inputs):
        hidden = self.hidden(role, trunk, *inputs)
        if torch.is_grad_enabled():
            self.check_that_the_last_try_is_gone()
            if self.where == "backward" and trunk.shape[0] * trunk.shape[1] > self.fits:
                self.alive = [weakref.ref(hidden), weakref.ref(trunk)]
                hidden.register_hook(self.fail)
            else:
                self.note(trunk, hidden)
        return hidden

    def note(self, trunk, *tensors):
        self.seen.append(trunk.shape[0] * trunk.shape[1])
        if self.seen[-1] > self.fits:
            self.alive = [weakref.ref(x) for x in (trunk, *tensors)]
            self.fail()

    def fail(self, *_):
        self.failed += 1
        raise self.error.with_traceback(None)

    def check_that_the_last_try_is_gone(self):
        if self.failed:
            assert not any(x() is not None for x in self.alive), "a failed try is still held"
            self.failed = 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("free")
    trainer(path, num_ppo_epochs=1).train()
    return lines(path)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("score", ERRORS[0]),
        ("forward", ERRORS[0]),
        ("forward", ERRORS[1]),
        ("forward", ERRORS[2]),
        ("backward", ERRORS[0]),
    ],
    ids=["score", "forward", "python", "cpu", "backward"],
)
def test_a_run_goes_on_in_smaller_parts(tmp_path, monkeypatch, undisturbed, where, error):
    t = trainer(tmp_path, num_ppo_epochs=1)
    said = []
    monkeypatch.setattr(t.budget, "say", said.append)
    memory = SmallMemory(t.backbone, monkeypatch, where, error)
    t.train()
    assert all(size <= FITS for size in memory.seen[-4:])
    # 8 sequences of 9 tokens are 72, of which half is tried.
    for line, expected in zip(lines(tmp_path), undisturbed, strict=True):
        assert line["memory/microbatch_tokens"] == 36 and line["memory/retries"] == 1
        assert expected["memory/microbatch_tokens"] == 80 and expected["memory/retries"] == 0
        assert abs(line["check/first_ratio"] - 1) <= 1e-4
    first, expected = lines(tmp_path)[0], undisturbed[0]
    for key in ("loss/policy", "loss/value", "policy/entropy", "objective/scores", "grad_norm"):
        assert first[key] == pytest.approx(expected[key], rel=1e-2, abs=1e-5), key
    assert len(said) == 1 and "microbatch_tokens is 36 instead of 80" in said[0]


def prepared(t):
    """What an update of the first minibatch takes."""
    prompts = next(t.batches()).batch()
    rollout = t.engine.generate(prompts, t.generator)
    rows = t.deal(len(prompts))
    layouts = t.cut(rollout.sequences, rows, t.budget.tokens)
    experience = module.score(t.backbone, rollout, layouts, t.config)
    noise = torch.randn(2, *rollout.response_mask.shape, generator=torch.Generator().manual_seed(3))
    experience = experience.with_advantages(noise[0], noise[1])
    return experience, rows[0], t.algorithm.spec(t.config, 1.0, t.state)


def plain_steps(t, learning_rate=1.0):
    """Steps along the gradient: Adam's first would blow its rounding up."""
    optimizer = torch.optim.SGD(t.backbone.trainable(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    t.updater = Updater(optimizer, schedule, t.config)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("way", ["sorted", "packed", "in_order"])
@pytest.mark.parametrize("fits", [70, 20])
def test_the_repeated_step_is_the_step(tmp_path, monkeypatch, where, way, fits):
    results = []
    for name in ("free", "small"):
        t = trainer(tmp_path / name, microbatching=way, microbatch_tokens=10**6)
        plain_steps(t)
        experience, rows, spec = prepared(t)
        before = [p.detach().clone() for p in t.backbone.trainable()]
        if name == "small":
            memory = SmallMemory(t.backbone, monkeypatch, where, fits=fits)
        (loss,) = t.update(experience, rows, spec, first=True)
        moved = [p.detach() - b for p, b in zip(t.backbone.trainable(), before, strict=True)]
        assert all(p.grad is None for p in t.backbone.trainable())
        results.append((loss, moved))
    assert t.budget.retries >= 1 and t.budget.tokens < 16 * 9 and max(memory.seen[-2:]) <= fits
    (loss, moved), (other, other_moved) = results
    assert float(other.loss) == pytest.approx(float(loss.loss), rel=1e-4, abs=1e-6)
    assert max(float(x.abs().max()) for x in moved) > 1e-3, "no step was taken"
    for x, y in zip(moved, other_moved, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(x.abs().max()) + 1e-9)


def test_a_single_sequence_that_does_not_fit_ends_the_run(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    monkeypatch.setattr(t, "evaluate", lambda when, step: None)
    SmallMemory(t.backbone, monkeypatch, "forward", fits=8)
    with pytest.raises(UserError, match="single sequence of 9 tokens") as error:
        t.train()
    for change in ("gradient_checkpointing", "train_layers", "quantization", "response_length"):
        assert change in str(error.value)
    assert (tmp_path / "run/checkpoints/interrupted/adapter_model.safetensors").exists()
    t = trainer(tmp_path / "b", gradient_checkpointing=True)
    text = t.budget.too_long(9)
    assert "gradient_checkpointing" not in text and "lower train_layers" in text


def test_a_step_that_was_half_taken_is_not_taken_again(tmp_path, monkeypatch):
    config = dict(
        optimizer_in_backward=True, microbatch_tokens=10**6, grad_clip="per_parameter",
        num_mini_batches=1,
    )  # fmt: skip
    t = trainer(tmp_path, **config)
    memory = SmallMemory(t.backbone, monkeypatch, "backward", fits=8)
    with pytest.raises(UserError, match="set optimizer_in_backward to false"):
        t.train()
    assert memory.failed == 1
    assert (tmp_path / "run/checkpoints/interrupted/adapter_model.safetensors").exists()


def test_an_optimizer_that_does_not_fit_is_not_tried_twice(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    calls = []

    def step(*_):
        calls.append(1)
        raise MemoryError

    monkeypatch.setattr(t.updater.optimizer, "step", step)
    with pytest.raises(UserError, match="while the optimizer stepped"):
        t.train()
    assert len(calls) == 1


def test_other_errors_are_not_swallowed(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    memory = SmallMemory(t.backbone, monkeypatch, "forward", RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        t.train()
    assert memory.failed == 1 and t.budget.retries == 0
    assert [is_out_of_memory(error) for error in ERRORS] == [True] * 3
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_the_budget_is_halved_from_what_was_tried():
    mask = torch.ones(6, 10, dtype=torch.bool)
    sequences = Sequences(mask, mask[:, 5:])
    budget = MicrobatchBudget(replace(FAST, microbatch_tokens=10**9))
    tried = []

    def attempt(layouts):
        tried.append([x.num_sequences for x in layouts])
        if max(tried[-1]) > 1:
            raise MemoryError
        return "done"

    def parts(tokens):
        return cut(sequences, torch.arange(6), "sorted", tokens)

    assert budget.run(parts, attempt) == "done"
    assert tried == [[6], [3, 3], [1] * 6]
    assert (budget.tokens, budget.retries) == (13, 2)
    # The next step starts there.
    assert budget.run(parts, attempt) == "done" and len(tried) == 4


def test_scoring_again_fills_the_whole_cache(tmp_path, monkeypatch):
    """A try that broke off half-way leaves no hole in what the next one keeps."""
    t = trainer(tmp_path)
    rollout = replace(t.engine.generate(next(t.batches()).batch(), t.generator), trunk=None)
    rows = torch.arange(32)

    def scored():
        return t.budget.run(
            lambda tokens: t.cut(rollout.sequences, [rows], tokens),
            lambda layouts: module.score(t.backbone, rollout, layouts, t.config),
        )

    expected = scored()
    SmallMemory(t.backbone, monkeypatch, "score")
    again = scored()
    assert t.budget.retries == 1
    kept = rollout.sequences.inputs
    torch.testing.assert_close(
        again.trunk.device_rows[kept], expected.trunk.device_rows[kept], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(again.kl, expected.kl, rtol=1e-4, atol=1e-5)
    assert json.dumps(t.budget.metrics())


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
def test_sampling_that_does_not_fit_names_what_to_lower(tmp_path, monkeypatch, error):
    t = trainer(tmp_path)

    def generate(prompts, generator):
        raise error.with_traceback(None)

    monkeypatch.setattr(t.engine, "generate", generate)
    held_out = len(t.held_out)
    with pytest.raises(UserError, match=f"while sampling {held_out} responses; lower eval_prompts"):
        t.train()
    assert (tmp_path / "run/checkpoints/interrupted/adapter_model.safetensors").exists()
    with pytest.raises(UserError, match="while sampling 32 responses; lower batch_size or lower"):
        t.step(1, next(t.batches()))
    monkeypatch.setattr(t, "config", replace(t.config, eval_prompts=held_out + 1))
    with pytest.raises(UserError, match="give fewer rows in eval_dataset or lower response_length"):
        t.evaluate("", 0)


def test_other_errors_of_sampling_are_not_swallowed(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    monkeypatch.setattr(t.engine, "generate", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match=r"^no$"):
        t.step(1, next(t.batches()))
