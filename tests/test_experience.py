"""Scoring gives the same numbers for any split of the batch and any source of the trunk."""

from dataclasses import fields, replace

import pytest
import tiny
import torch

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.config import PPOConfig
from fastrlhf.data import PromptSet
from fastrlhf.experience import microbatches, score
from fastrlhf.rollout.decode import DecodeEngine
from fastrlhf.types import Experience

CONFIG = PPOConfig(response_length=6, kl_estimator="k1", temperature=0.9)


@pytest.fixture(scope="module")
def scene():
    """A policy that has moved away from its reference, and a rollout of it."""
    tokenizer = tiny.tokenizer()
    backbone = SharedBackbone(tiny.model(), lora=LoraSettings(rank=4), train_layers=2)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rows = [{"prompt": p} for p in ("the film", "a", "no plot", "it was", "bad", "we")]
    prompts = PromptSet.tokenize(rows, tokenizer, context=64, response_length=6).batch()
    engine = DecodeEngine(backbone, tokenizer, response_length=6, temperature=0.9)
    return backbone, engine.generate(prompts, torch.Generator().manual_seed(0))


def compare(a: Experience, b: Experience, mask, **tolerance):
    for field in fields(Experience):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name != "trunk" and x is not None:
            x, y = (v[mask] if v.shape[:2] == mask.shape else v for v in (x, y))
            torch.testing.assert_close(x, y, **tolerance)


def test_the_split_changes_only_rounding(scene):
    backbone, rollout = scene
    whole = score(backbone, rollout, [torch.arange(6)], CONFIG)
    parts = [torch.tensor([4, 0]), torch.tensor([3]), torch.tensor([5, 1, 2])]
    compare(whole, score(backbone, rollout, parts, CONFIG), rollout.response_mask,
            rtol=1e-4, atol=1e-5)  # fmt: skip


def test_the_trunk_of_sampling_is_the_trunk(scene):
    backbone, rollout = scene
    assert rollout.trunk is not None
    kept = rollout.attention_mask.clone()
    kept[:, -1] = False
    again = backbone.trunk(rollout.tokens, rollout.attention_mask)
    torch.testing.assert_close(rollout.trunk[kept], again[kept], rtol=1e-4, atol=1e-5)
    recomputed = score(backbone, replace(rollout, trunk=None), [torch.arange(6)], CONFIG)
    recorded = score(backbone, rollout, [torch.arange(6)], CONFIG)
    compare(recorded, recomputed, rollout.response_mask, rtol=1e-4, atol=1e-5)


def test_old_logprobs_are_those_of_sampling_and_kl_is_the_sum_over_the_vocabulary(scene):
    backbone, rollout = scene
    mask = rollout.response_mask
    scored = score(backbone, rollout, [torch.arange(6)], CONFIG)
    torch.testing.assert_close(
        scored.old_logprobs[mask], rollout.rollout_logprobs[mask], rtol=1e-4, atol=1e-4
    )
    start = rollout.prompts.tokens.shape[1]
    with torch.no_grad():
        logprobs = {
            role: (backbone.head.logits(backbone.hidden(role, scored.trunk, scored.attention_mask))
                   / CONFIG.temperature).log_softmax(-1)[:, start - 1 : -1]
            for role in ("policy", "reference")
        }  # fmt: skip
    ours, theirs = logprobs["policy"], logprobs["reference"]
    torch.testing.assert_close(
        scored.kl[mask], (ours.exp() * (ours - theirs)).sum(-1)[mask], rtol=1e-3, atol=1e-5
    )
    expected = theirs.gather(-1, scored.responses[..., None])[..., 0]
    torch.testing.assert_close(scored.ref_logprobs[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert scored.kl[mask].min() > 0


def test_microbatches_keep_to_the_budget():
    parts = microbatches(torch.arange(10), length=7, token_budget=21)
    assert [len(p) for p in parts] == [3, 3, 3, 1]
    assert [len(p) for p in microbatches(torch.arange(2), length=7, token_budget=3)] == [1, 1]
