"""Scores, losses and gradients are the same for any cut of the batch."""

from dataclasses import replace

import pytest
import tiny
import torch

from fastrlhf.algorithms import ALGORITHMS
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.config import PPOConfig
from fastrlhf.controllers import AlgorithmState
from fastrlhf.data import PromptSet
from fastrlhf.experience import gather, score
from fastrlhf.heads import LanguageModelHead
from fastrlhf.losses import MinibatchLoss, microbatch_loss
from fastrlhf.microbatches import cut
from fastrlhf.rollout.decode import DecodeEngine
from fastrlhf.types import Experience

CONFIG = PPOConfig(response_length=12, kl_estimator="k1", temperature=0.9)
PROMPTS = ("the film", "a", "no plot", "it was", "bad", "we", "a long opening", "so")
ALL = torch.arange(len(PROMPTS))
WAYS = [(way, budget) for way in ("sorted", "packed", "in_order") for budget in (1, 40, 10**6)]


def moved_policy(critic="shared", **changes) -> SharedBackbone:
    """A policy that has moved away from its reference, and may stop."""
    backbone = SharedBackbone(
        tiny.model(**changes), lora=LoraSettings(rank=4), train_layers=2, critic=critic
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        # The row of a padding token starts at zero; a stop token must be likely enough to be drawn.
        backbone.head.weight[0] = backbone.head.weight[5]
    return backbone


def sample_rollout(backbone, **settings):
    prompts = PromptSet.tokenize(
        [{"prompt": p} for p in PROMPTS], tiny.tokenizer(), context=64, response_length=12
    ).batch()
    engine = DecodeEngine(
        backbone, tiny.tokenizer(), response_length=12, temperature=0.9, **settings
    )
    return engine.generate(prompts, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def scene():
    backbone = moved_policy()
    rollout = sample_rollout(backbone)
    lengths = rollout.response_mask.sum(-1)
    assert lengths.min() < 5 and lengths.max() == 12, "responses of one length show nothing"
    return backbone, rollout


def scored(backbone, rollout, way=("in_order", 10**6), config=CONFIG, rows=ALL) -> Experience:
    return score(backbone, rollout, cut(rollout.sequences, rows, *way), config)


SHUFFLED = torch.tensor([4, 0, 7, 6, 3, 5, 1, 2])
COLUMNS = ("old_logprobs", "ref_logprobs", "ref_hidden", "kl", "entropy", "values")


def compare(a: Experience, b: Experience, **tolerance):
    for name in COLUMNS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_the_cut_changes_only_rounding(scene, way, estimator):
    backbone, rollout = scene
    config = replace(CONFIG, kl_estimator=estimator)
    whole = scored(backbone, rollout, config=config)
    again = scored(backbone, rollout, way, config, SHUFFLED)
    compare(whole, again, rtol=1e-4, atol=2e-5)
    assert (again.ref_hidden is None) == (estimator != "exact")


def minibatch_loss(backbone, experience, way, config, rows=ALL, kinds=("both",)):
    """The loss of a minibatch, summed over its microbatches, and its gradients."""
    spec = ALGORITHMS["ppo"].spec(config, 1.3, AlgorithmState.of(config))
    num_items = int(experience.response_mask[rows].sum())
    parts = []
    for layout in cut(experience.sequences, rows, *way):
        batch = gather(backbone, experience, layout)
        for kind in kinds:
            part = microbatch_loss(backbone, batch, spec, config, num_items, share=kind)
            part.loss.backward()
            parts.append(part.detached())
    gradients = [p.grad for p in backbone.trainable()]
    for parameter in backbone.parameters():
        parameter.grad = None
    return MinibatchLoss.of(parts), gradients


def learnable(backbone, rollout, config) -> Experience:
    """An experience with something to learn, of a policy that has moved since."""
    experience = scored(backbone, rollout, config=config)
    noise = torch.randn(4, *rollout.response_mask.shape, generator=torch.Generator().manual_seed(3))
    old = experience.old_logprobs + 0.3 * noise[2]
    values = None if experience.values is None else experience.values + 0.3 * noise[3]
    # One sequence was not judged.
    experience, _ = experience.judged_by(torch.tensor([0.0] * 7 + [torch.nan]))
    return replace(experience, old_logprobs=old, values=values).with_advantages(noise[0], noise[1])


def assert_same_update(one, other, **tolerance):
    (loss, gradients), (other_loss, other_gradients) = one, other
    for x, y in zip((loss.loss, *loss.policy.stats, loss.value.loss, *loss.value.stats),
                    (other_loss.loss, *other_loss.policy.stats, other_loss.value.loss,
                     *other_loss.value.stats), strict=True):  # fmt: skip
        torch.testing.assert_close(x, y, equal_nan=True, **tolerance)
    for x, y in zip(gradients, other_gradients, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            scale = float(x.abs().max()) if tolerance["rtol"] else 0
            torch.testing.assert_close(x, y, rtol=tolerance["rtol"], atol=1e-5 * scale)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_loss_and_gradient_do_not_depend_on_the_cut(scene, way, estimator):
    backbone, rollout = scene
    config = replace(CONFIG, kl_estimator=estimator)
    experience = learnable(backbone, rollout, config)
    whole = minibatch_loss(backbone, experience, ("in_order", 10**6), config)
    assert whole[0].policy.stats.clipfrac > 0 and whole[0].value.stats.clipfrac > 0
    again = minibatch_loss(
        backbone, experience, way, config, torch.tensor([4, 0, 7, 6, 3, 5, 1, 2])
    )
    assert_same_update(whole, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "adapter"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_update_repeats_what_scoring_found_to_the_last_bit(way, critic):
    backbone = moved_policy(critic)
    rollout = sample_rollout(backbone)
    experience = scored(backbone, rollout, way)
    loss, _ = minibatch_loss(backbone, experience, way, CONFIG)
    # Every ratio is 1 then; their mean, summed over microbatches, is 1 but for rounding.
    assert loss.policy.stats.approx_kl == 0 and loss.policy.stats.clipfrac == 0


def test_each_sequence_by_itself_and_unpadded_gives_the_same(scene):
    """The plain way: no cache, no padding, all logits."""
    backbone, rollout = scene
    experience = scored(backbone, rollout, ("packed", 40))
    start = rollout.prompts.tokens.shape[1]
    for row in range(len(PROMPTS)):
        tokens = rollout.tokens[row][rollout.attention_mask[row]][None]
        count = int(rollout.response_mask[row].sum())
        with torch.no_grad(), backbone.role("policy") as decoder:
            hidden = decoder(tokens).last_hidden_state
            logprobs = (backbone.head.logits(hidden) / CONFIG.temperature).log_softmax(-1)
        drawn = rollout.tokens[row, start : start + count]
        expected = logprobs[0, -count - 1 : -1].gather(-1, drawn[:, None])[:, 0]
        torch.testing.assert_close(
            experience.old_logprobs[row, :count], expected, rtol=1e-4, atol=1e-4
        )
        assert (experience.old_logprobs[row, count:] == 0).all()


def test_old_logprobs_are_those_of_sampling_and_kl_is_the_sum_over_the_vocabulary(scene):
    backbone, rollout = scene
    mask = rollout.response_mask
    experience = scored(backbone, rollout)
    torch.testing.assert_close(
        experience.old_logprobs[mask], rollout.rollout_logprobs[mask], rtol=1e-4, atol=1e-4
    )
    start = rollout.prompts.tokens.shape[1]
    with torch.no_grad():
        trunk = backbone.trunk(rollout.tokens, rollout.attention_mask)
        logprobs = {
            role: (backbone.head.logits(backbone.hidden(role, trunk, rollout.attention_mask))
                   / CONFIG.temperature).log_softmax(-1)[:, start - 1 : -1]
            for role in ("policy", "reference")
        }  # fmt: skip
    ours, theirs = logprobs["policy"], logprobs["reference"]
    torch.testing.assert_close(
        experience.kl[mask], (ours.exp() * (ours - theirs)).sum(-1)[mask], rtol=1e-3, atol=1e-5
    )
    expected = theirs.gather(-1, rollout.responses[..., None])[..., 0]
    torch.testing.assert_close(experience.ref_logprobs[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert experience.kl[mask].min() > 0
    assert (experience.kl[~mask] == 0).all()


def test_without_a_reference_nothing_is_said_of_the_kl(scene, monkeypatch):
    backbone, rollout = scene
    config = replace(CONFIG, kl_coef=0.0)
    with_one = learnable(backbone, rollout, config)
    assert with_one.kl is not None and with_one.ref_logprobs is None
    monkeypatch.setattr(backbone, "has_reference", False)
    experience = learnable(backbone, rollout, config)
    assert experience.kl is None and experience.ref_logprobs is None
    for name in ("old_logprobs", "entropy", "values"):
        assert torch.equal(getattr(experience, name), getattr(with_one, name))
    scores = torch.ones(len(PROMPTS))
    ppo, state = ALGORITHMS["ppo"], AlgorithmState.of(config)
    learnt = ppo.advantages(scores, experience, config, state)
    assert torch.equal(
        learnt.advantages, ppo.advantages(scores, with_one, config, state).advantages
    )
    minibatch_loss(backbone, experience, ("sorted", 40), config)


class AnotherHead(SharedBackbone):
    reference_head = LanguageModelHead(
        torch.randn(28, 32, generator=torch.Generator().manual_seed(9)), None
    )


@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_the_reference_may_have_a_head_of_its_own(scene, monkeypatch, estimator):
    backbone, rollout = scene
    config = replace(CONFIG, kl_estimator=estimator)
    shared = learnable(backbone, rollout, config)
    monkeypatch.setattr(backbone, "__class__", AnotherHead)
    experience = learnable(backbone, rollout, config)
    mask = rollout.response_mask
    with torch.no_grad():
        trunk = backbone.trunk(rollout.tokens, rollout.attention_mask)
        ours, theirs = (
            (head.logits(backbone.hidden(role, trunk, rollout.attention_mask)) / CONFIG.temperature)
            .log_softmax(-1)[:, -13:-1][mask]
            for role, head in (
                ("policy", backbone.head), ("reference", backbone.reference_head)
            )
        )  # fmt: skip
    exact = (ours.exp() * (ours - theirs)).sum(-1)
    torch.testing.assert_close(experience.kl[mask], exact, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(experience.kl, shared.kl)
    if estimator == "k1":
        sampled = theirs.gather(-1, rollout.responses[mask][:, None])[:, 0]
        torch.testing.assert_close(experience.ref_logprobs[mask], sampled, rtol=1e-3, atol=1e-3)
    else:
        # The loss sees that head too: its KL is the one that scoring found.
        loss, _ = minibatch_loss(backbone, experience, ("sorted", 40), config)
        trains = experience.response_mask
        torch.testing.assert_close(
            loss.policy.stats.kl, experience.kl[trains].mean(), rtol=1e-4, atol=1e-5
        )


def test_without_a_critic_there_is_no_value_loss():
    backbone = moved_policy(critic=None)
    rollout = sample_rollout(backbone)
    experience = scored(backbone, rollout)
    assert experience.values is None
    loss, gradients = minibatch_loss(backbone, experience, ("sorted", 40), CONFIG)
    assert loss.value is None and loss.loss == loss.policy.loss
    assert all(g is not None for g in gradients)
