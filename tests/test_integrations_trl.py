"""TRL's own trainers with our head and without: the same numbers, in less memory."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import utils

from fastrlhf.integrations import trl as integration

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]
ORIGINAL = utils._ChunkedLogProbFunction
USES_TRITON = utils._use_triton
TOLERANCE = 1e-5  # the two ops differ in the order of float32 sums, which three steps carry on

PROMPTS = [{"prompt": text} for text in ("once upon", "the cat sat", "hello", "a dog")]
PAIRS = [{"prompt": "the cat ", "chosen": "sat down", "rejected": "flew"}] * 2
LABELLED = [
    {"prompt": "the cat ", "completion": "sat down", "label": True},
    {"prompt": "a dog ", "completion": "barks", "label": False},
]
TEXTS = [{"text": "the cat sat on a mat"}, {"text": "a dog barks"}]


@dataclass
class Seen(TrainerCallback):
    """What a run of a trainer computed."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.logs.append({k: v for k, v in logs.items() if "time" not in k})


class LivePeak(TorchDispatchMode):
    """Peak bytes of the tensors that are created while this mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, weakref.ref]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.live:
            return

        def freed(_: object) -> None:
            self.total -= self.live.pop(key)[0]

        self.live[key] = (storage.nbytes(), weakref.ref(storage, freed))
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)


def reward(completions: list[str], **_) -> list[float]:
    return [float(text.count("a")) - 0.1 * len(set(text)) for text in completions]


@pytest.fixture
def trained(tmp_path) -> Callable[..., Seen]:
    """Run a trainer of TRL's on the tiny model, from the same start each time."""
    torch.manual_seed(0)
    folder = tiny.folder(tmp_path / "tiny")

    def train(
        trainer_class,
        config_class,
        rows,
        *,
        model=None,
        peft_config=None,
        measure=False,
        **settings,
    ) -> Seen:
        defaults = dict(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=1,
            learning_rate=1e-2, optim="sgd", use_cpu=True, bf16=False, seed=0, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        given = {"reward_funcs": reward} if trainer_class in (GRPOTrainer, RLOOTrainer) else {}
        seen = Seen()
        trainer = trainer_class(
            model=str(folder) if model is None else model, args=config_class(**defaults | settings),
            train_dataset=Dataset.from_list(rows), processing_class=tiny.tokenizer(),
            callbacks=[seen], peft_config=peft_config, **given,
        )  # fmt: skip
        if measure:
            with LivePeak() as memory:
                trainer.train()
            seen.peak_bytes = memory.peak
        else:
            trainer.train()
        return seen

    return train


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()
    assert utils._ChunkedLogProbFunction is ORIGINAL
    assert utils._use_triton is USES_TRITON


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Rows of each call of our op."""
    counted: list[int] = []
    apply = integration.ChunkedLogProbs.apply

    def counting(hidden, *rest):
        counted.append(len(hidden))
        return apply(hidden, *rest)

    monkeypatch.setattr(integration.ChunkedLogProbs, "apply", counting)
    return counted


def forbid(monkeypatch) -> None:
    """TRL's own op raises from here on."""

    def forward(*_):
        raise AssertionError("TRL's op was called")

    monkeypatch.setattr(ORIGINAL, "forward", staticmethod(forward))


def distance(got: Seen, truth: Seen) -> float:
    """The largest relative difference between two runs' losses, gradients and logged numbers."""
    assert len(got.losses) == len(truth.losses) == len(truth.gradients) > 0
    worst = 0.0
    for ours, theirs in zip(got.gradients, truth.gradients, strict=True):
        assert ours.keys() == theirs.keys() and theirs
        for name, truth_gradient in theirs.items():
            difference = (ours[name].double() - truth_gradient.double()).norm()
            worst = max(worst, float(difference / truth_gradient.double().norm().clamp(min=1e-12)))
    for ours, theirs in zip(got.logs, truth.logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # Losses of normalised advantages are sums that cancel.
            worst = max(worst, abs(ours[name] - value) / max(abs(value), 0.1))
    return worst


GRPO = dict(
    per_device_train_batch_size=8, num_generations=4, max_completion_length=10, max_steps=3,
    num_iterations=3, temperature=0.7, beta=0.04, entropy_coef=0.05,
)  # fmt: skip


def test_grpo_for_three_steps(trained, calls, monkeypatch):
    rows = PROMPTS * 2
    truth = trained(GRPOTrainer, GRPOConfig, rows, **GRPO)
    assert not calls
    assert len({round(loss, 4) for loss in truth.losses}) == 3, "the steps must differ"
    with integration.patch():
        forbid(monkeypatch)
        got = trained(GRPOTrainer, GRPOConfig, rows, **GRPO)
    # Three steps, and the old and the reference log-probabilities of their one rollout.
    assert len(calls) == 5
    assert distance(got, truth) < TOLERANCE


@pytest.mark.parametrize("lost", ["temperature", "entropy"])
def test_a_wrong_op_is_noticed(trained, monkeypatch, lost):
    rows = PROMPTS * 2
    truth = trained(GRPOTrainer, GRPOConfig, rows, **GRPO | {"max_steps": 1})
    apply = integration.ChunkedLogProbs.apply

    def wrong(hidden, weight, bias, targets, temperature, *rest):
        if lost == "temperature":
            return apply(hidden, weight, bias, targets, 1.0, *rest)
        found = list(apply(hidden, weight, bias, targets, temperature, *rest))
        found[1] = None if found[1] is None else found[1].detach()
        return tuple(found)

    monkeypatch.setattr(integration.ChunkedLogProbs, "apply", wrong)
    with integration.patch():
        got = trained(GRPOTrainer, GRPOConfig, rows, **GRPO | {"max_steps": 1})
    assert distance(got, truth) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "settings"),
    [
        (RLOOTrainer, RLOOConfig, PROMPTS,
         dict(per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
              temperature=0.7, beta=0.04)),
        # use_weighting asks for log_sum_sq_probs.
        (DPOTrainer, DPOConfig, PAIRS, dict(use_weighting=True)),
        (KTOTrainer, KTOConfig, LABELLED, {}),
        (SFTTrainer, SFTConfig, TEXTS, {}),
        (DPOTrainer, DPOConfig, PAIRS, dict(peft_config=LoraConfig(target_modules=["q_proj"]))),
    ],
    ids=["rloo", "dpo", "kto", "sft", "dpo-lora"],
)  # fmt: skip
def test_one_step_of(trainer, config, rows, settings, trained, calls, monkeypatch):
    truth = trained(trainer, config, rows, **settings)
    assert not calls
    with integration.patch():
        forbid(monkeypatch)
        got = trained(trainer, config, rows, **settings)
    assert calls
    assert distance(got, truth) < TOLERANCE


def test_grpo_takes_less_memory(trained, tmp_path):
    vocabulary = 32_768
    folder = tmp_path / "wide"
    tiny.model(vocab_size=vocabulary).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    settings = GRPO | dict(
        model=str(folder), measure=True, max_steps=1, num_iterations=1, max_completion_length=24
    )
    theirs = trained(GRPOTrainer, GRPOConfig, PROMPTS * 2, **settings)
    with integration.patch():
        ours = trained(GRPOTrainer, GRPOConfig, PROMPTS * 2, **settings)
    assert distance(ours, theirs) < TOLERANCE
    assert ours.peak_bytes < 0.25 * theirs.peak_bytes
