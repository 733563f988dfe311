"""Each identity holds within the rounding of what it compares, and is refused beyond it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_trainer_algorithms import PROMPTS, share_of_e, train

import fastrlhf.trainer as module
from fastrlhf import GRPOConfig, PPOConfig, PPOTrainer, SelfCheckError
from fastrlhf.backbone import SharedBackbone
from fastrlhf.selfcheck import ROLLOUT_SLACK, check_experience, check_first_minibatch
from fastrlhf_kernels import PolicyLossSpec, policy_loss


def stats(gaps):
    """Of tokens whose log-probabilities lie so far from the old ones."""
    old = torch.full_like(gaps, -2.0)
    mask = torch.ones_like(gaps, dtype=torch.bool)
    return policy_loss(old + gaps, old, torch.ones_like(gaps), mask, PolicyLossSpec()).stats


def rounding(size):
    """Log-ratios up to ``size``, most of them less."""
    return size * (2 * torch.rand(4096, generator=torch.Generator().manual_seed(0)) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sampled_old_logprobs_may_be_of_samplings_rounding(dtype):
    for gaps in (rounding(ROLLOUT_SLACK[dtype]), torch.full((64,), 0.99 * ROLLOUT_SLACK[dtype])):
        check_first_minibatch(stats(gaps), dtype, alike=False)
        with pytest.raises(SelfCheckError, match="scoring and update compute different things"):
            check_first_minibatch(stats(gaps), dtype)
    for beyond in (rounding(4 * ROLLOUT_SLACK[dtype]), torch.full((64,), torch.nan)):
        with pytest.raises(SelfCheckError, match="another forward's rounding allows"):
            check_first_minibatch(stats(beyond), dtype, alike=False)


def gap_check(gaps, dtype, **settings):
    """`check_experience` of log-probabilities that lie so far from those of sampling."""
    sampled, none = torch.full_like(gaps, -2.0), torch.zeros_like(gaps)
    experience = SimpleNamespace(
        response_mask=torch.ones_like(gaps, dtype=torch.bool), kl=none, entropy=none,
        old_logprobs=sampled + gaps,
    )  # fmt: skip
    rollout = SimpleNamespace(rollout_logprobs=sampled)
    return check_experience(experience, rollout, untrained=True, dtype=dtype, **settings)


def test_in_16_bits_one_token_of_hundreds_may_be_far_off_and_a_sequence_not():
    gaps = 0.02 * torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    gaps[3, 5] = 0.9
    assert gap_check(gaps, torch.bfloat16)["rollout/logprob_gap_max"] == pytest.approx(0.9)
    with pytest.raises(SelfCheckError, match=r"differ by 0\.9"):
        gap_check(gaps, torch.float32)
    gaps[7] = 0.9  # one sequence of 64, as with wrong positions
    with pytest.raises(SelfCheckError, match=r"differ by 0\.9"):
        gap_check(gaps, torch.bfloat16)
    gaps[9, 9] = torch.nan
    with pytest.raises(SelfCheckError):
        gap_check(gaps, torch.float32)


def test_a_temperature_below_1_widens_the_gap():
    gaps = torch.full((8, 8), 1.5e-2)
    with pytest.raises(SelfCheckError, match="differ by"):
        gap_check(gaps, torch.float32, temperature=2.0)
    gap_check(gaps, torch.float32, temperature=0.5)
    check_first_minibatch(stats(gaps.flatten()), torch.float32, alike=False, temperature=0.5)
    with pytest.raises(SelfCheckError, match="another forward's rounding allows"):
        check_first_minibatch(stats(gaps.flatten()), torch.float32, alike=False)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_reference_that_is_another_model_may_differ_before_the_first_step(tmp_path, quantization):
    """A second model is given, or it is a copy in 8 bits."""
    model = tiny.model()
    settings = dict(
        batch_size=8, total_episodes=8, response_length=4, use_peft=False, train_layers="all",
        eval_prompts=2, num_samples=0, output_dir=str(tmp_path / "run"), critic="shared",
    )  # fmt: skip
    if quantization is None:
        source = SharedBackbone(
            model,
            lora=None,
            train_layers="all",
            critic="shared",
            reference_model=tiny.model(seed=3),
        )
    else:
        model.save_pretrained(tmp_path / "model")
        tiny.tokenizer().save_pretrained(tmp_path / "model")
        source, settings["reference_quantization"] = str(tmp_path / "model"), quantization
    trainer = PPOTrainer(
        source, share_of_e, PPOConfig(**settings), PROMPTS, processing_class=tiny.tokenizer()
    )
    trainer.train()
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert line["objective/kl"] > 0


def test_a_backbone_that_was_trained_is_not_taken_for_a_new_one(tmp_path):
    trainer, *_ = train(tmp_path / "first", rollouts=1)
    again = PPOTrainer(
        trainer.backbone, share_of_e, replace(trainer.config, output_dir=str(tmp_path / "second")),
        PROMPTS, processing_class=tiny.tokenizer(),
    )  # fmt: skip
    again.train()


def test_scored_ones_may_not():
    check_first_minibatch(stats(torch.zeros(8)), torch.float32)
    with pytest.raises(SelfCheckError, match="instead of 1, 0, 0"):
        check_first_minibatch(stats(rounding(1e-2)), torch.float32)


def test_a_run_on_sampled_ones_bears_samplings_rounding(tmp_path, monkeypatch):
    original = module.score

    def rounded(*given):
        experience = original(*given)
        gaps = rounding(5e-3)[: experience.old_logprobs.numel()]
        off = experience.old_logprobs + gaps.view_as(experience.old_logprobs)
        return replace(experience, old_logprobs=off)

    monkeypatch.setattr(module, "score", rounded)
    settings = {"kind": GRPOConfig, "rollouts": 1, "num_generations": 4}
    _, _, (line,) = train(tmp_path / "sampled", old_logprobs="sampled", **settings)
    assert 0 < line["check/first_approx_kl"] < 5e-5
    with pytest.raises(SelfCheckError, match="instead of 1, 0, 0"):
        train(tmp_path / "scored", **settings)
    # Memory ran out between scoring and update: microbatches of another shape, too.
    epochs = PPOTrainer.epochs

    def halved(self, *given):
        self.budget.tokens //= 2
        return epochs(self, *given)

    monkeypatch.setattr(PPOTrainer, "epochs", halved)
    _, _, (line,) = train(tmp_path / "halved", **settings)
    assert 0 < line["check/first_approx_kl"] < 5e-5
