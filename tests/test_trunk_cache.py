"""The trunk's states are the same wherever they lie and whenever they are computed."""

import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from test_experience import (
    ALL,
    CONFIG,
    PROMPTS,
    SHUFFLED,
    WAYS,
    assert_same_update,
    compare,
    learnable,
    minibatch_loss,
    moved_policy,
    sample_rollout,
    scored,
)
from transformers import GPT2Config, GPT2LMHeadModel

from fastrlhf.backbone import SharedBackbone
from fastrlhf.config import PPOConfig
from fastrlhf.errors import UserError
from fastrlhf.microbatches import Sequences, cut
from fastrlhf.trunk_cache import TrunkCache


@pytest.fixture(scope="module")
def scene():
    backbone = moved_policy()
    return backbone, sample_rollout(backbone)


def with_host_rows(rollout, device_rows: int):
    """The rollout with its first ``device_rows`` sequences' states on the device."""
    whole = rollout.trunk.device_rows
    cache = TrunkCache(*whole.shape, dtype=whole.dtype, device=whole.device, budget_mb=0)
    cache.device_rows = whole[:device_rows].clone()
    cache.host_rows = whole[device_rows:].clone()
    return replace(rollout, trunk=cache)


def test_the_states_of_sampling_are_those_of_the_trunk(scene):
    backbone, rollout = scene
    kept = rollout.sequences.inputs
    again = backbone.trunk(rollout.tokens, rollout.attention_mask)
    states = rollout.trunk.device_rows
    assert states.dtype == again.dtype and states.shape == again.shape
    torch.testing.assert_close(states[kept], again[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("on_device", [0, 3])
def test_where_the_states_lie_changes_no_bit(scene, way, on_device):
    backbone, rollout = scene
    config = replace(CONFIG, kl_estimator="exact")
    spilled = with_host_rows(rollout, on_device)
    one, other = (scored(backbone, r, way, config, SHUFFLED) for r in (rollout, spilled))
    compare(one, other, rtol=0, atol=0)
    one, other = (
        minibatch_loss(backbone, learnable(backbone, r, config), way, config, SHUFFLED)
        for r in (rollout, spilled)
    )
    assert_same_update(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_without_the_cache_no_bit_changes_where_the_trunk_runs_on_the_same_batches(scene, way):
    """Scoring's own forwards fill the cache here, since sampling kept nothing."""
    backbone, rollout = scene
    bare = replace(rollout, trunk=None)
    results = []
    for cached in (True, False):
        config = replace(CONFIG, kl_estimator="exact", trunk_cache=cached)
        experience = scored(backbone, bare, way, config)
        assert (experience.trunk is not None) == cached
        noise = torch.randn(experience.values.shape, generator=torch.Generator().manual_seed(1))
        ready = experience.with_advantages(noise, noise.roll(1))
        results.append((experience, minibatch_loss(backbone, ready, way, config)))
    (one, update), (other, other_update) = results
    compare(one, other, rtol=0, atol=0)
    assert_same_update(update, other_update, rtol=0, atol=0)


def test_without_the_cache_only_rounding_changes_on_other_batches(scene):
    backbone, rollout = scene
    config = replace(CONFIG, kl_estimator="exact")
    cached = learnable(backbone, rollout, config)
    again = replace(cached, trunk=None)
    one = minibatch_loss(backbone, cached, ("sorted", 40), config)
    other = minibatch_loss(backbone, again, ("packed", 50), config, SHUFFLED)
    # Gradients near zero carry the rounding of sums in another order.
    assert_same_update(one, other, rtol=1e-3, atol=1e-5)
    off = scored(backbone, replace(rollout, trunk=None), ("sorted", 40),
                 replace(config, trunk_cache=False))  # fmt: skip
    compare(scored(backbone, rollout, ("sorted", 40), config), off, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("budget_mb", [None, 0, 1])
def test_sampling_fills_what_the_budget_allows(budget_mb):
    backbone = moved_policy(hidden_size=2048, intermediate_size=16, initializer_range=0.02)
    rollout = sample_rollout(backbone, trunk_cache_mb=budget_mb)
    cache = rollout.trunk
    row_bytes = rollout.tokens.shape[1] * 2048 * 4
    fits = {None: len(PROMPTS), 0: 0, 1: 2**20 // row_bytes}[budget_mb]
    assert budget_mb != 1 or 0 < fits < len(PROMPTS), "the budget must cut the batch in two"
    assert (len(cache.device_rows), len(cache.host_rows)) == (fits, len(PROMPTS) - fits)
    assert (cache.device_bytes, cache.host_bytes) == (
        fits * row_bytes, (len(PROMPTS) - fits) * row_bytes,
    )  # fmt: skip
    states = torch.cat([cache.device_rows, cache.host_rows])
    again = backbone.trunk(rollout.tokens, rollout.attention_mask)
    kept = rollout.sequences.inputs
    torch.testing.assert_close(states[kept], again[kept], rtol=1e-3, atol=1e-3)
    # Scoring's own cache keeps to the budget too.
    config = replace(CONFIG, trunk_cache_mb=budget_mb)
    filled = scored(backbone, replace(rollout, trunk=None), ("sorted", 40), config).trunk
    assert len(filled.device_rows) == fits
    states = torch.cat([filled.device_rows, filled.host_rows])
    torch.testing.assert_close(states[kept], again[kept], rtol=1e-3, atol=1e-3)


def test_what_is_written_is_what_is_taken():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    sequences = Sequences(mask, mask[:, 2:])
    states = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for way in ("sorted", "packed", "in_order"):
        for kept in range(4):
            cache = TrunkCache(3, 4, 5, dtype=torch.float32, device=torch.device("cpu"))
            cache.host_rows = cache.device_rows[kept:].clone()
            cache.device_rows = cache.device_rows[:kept].clone()
            layouts = cut(sequences, torch.tensor([2, 0, 1]), way, 8)
            for layout in layouts:
                cache.write(layout, states.flatten(0, 1)[layout.token_index])
            for layout in layouts:
                expected = states.flatten(0, 1)[layout.token_index]
                own = layout.own
                taken = cache.take(layout)
                assert taken.shape == expected.shape
                assert torch.equal(taken.flatten(0, 1)[own], expected.flatten(0, 1)[own])


def test_nothing_is_kept_where_nothing_lies_below_or_nobody_asks():
    assert sample_rollout(moved_policy(), trunk_cache=False).trunk is None
    everything = SharedBackbone(tiny.model(), train_layers="all")
    rollout = sample_rollout(everything)
    assert rollout.trunk is None and scored(everything, rollout).trunk is None
    settings = GPT2Config(
        vocab_size=28, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    settings.model_type = "unheard-of"
    with pytest.warns(UserWarning, match="run whole"):
        whole = SharedBackbone(GPT2LMHeadModel(settings).eval(), train_layers=1)
    rollout = sample_rollout(whole)
    assert rollout.trunk is None and scored(whole, rollout, ("sorted", 40)).trunk is None


def test_a_cache_lives_as_long_as_its_experience(scene):
    backbone, _ = scene
    rollout = sample_rollout(backbone)
    experience = scored(backbone, rollout, ("sorted", 40), rows=ALL)
    states = weakref.ref(rollout.trunk.device_rows)
    del rollout
    assert states() is not None
    del experience
    assert states() is None


def test_settings_that_contradict_each_other():
    with pytest.raises(UserError, match="trunk_cache_mb must not be negative"):
        PPOConfig(trunk_cache_mb=-1)
    with pytest.raises(UserError, match="trunk_cache_mb needs trunk_cache"):
        PPOConfig(trunk_cache=False, trunk_cache_mb=100)
    with pytest.raises(UserError, match="'sorted' or 'packed' or 'in_order'"):
        PPOConfig(microbatching="random")
    assert PPOConfig(trunk_cache_mb=0).trunk_cache
