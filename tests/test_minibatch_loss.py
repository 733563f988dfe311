"""How the loss of a minibatch is put together: its shares, and where the head's gradient is summed.

Neither may change the gradient; both are there for memory.
"""

from dataclasses import replace

import pytest
import tiny
import torch
from test_experience import (
    ALL,
    CONFIG,
    learnable,
    minibatch_loss,
    moved_policy,
    sample_rollout,
)
from test_trainer import trainer

from fastrlhf import GRPOConfig, losses
from fastrlhf.backbone import SharedBackbone
from fastrlhf.experience import gather
from fastrlhf.losses import head_gradient, microbatch_loss, shares
from fastrlhf.microbatches import cut

PARTS = ("in_order", 60)
"""several microbatches"""
ADAPTER = replace(CONFIG, critic="adapter")


def differentiated(backbone, experience, config, kinds):
    """A minibatch's loss and the gradients of its shares, of which one graph is held at a time."""
    assert len(cut(experience.sequences, ALL, *PARTS)) > 2
    return minibatch_loss(backbone, experience, PARTS, config, kinds=kinds)


def test_a_critic_of_its_own_has_a_share_of_its_own():
    backbone = moved_policy("adapter")
    experience = learnable(backbone, sample_rollout(backbone), ADAPTER)
    assert shares(backbone, ADAPTER) == ("policy", "value")
    apart, gradients = differentiated(backbone, experience, ADAPTER, ("policy", "value"))
    together, expected = differentiated(backbone, experience, ADAPTER, ("both",))
    assert all(g is not None and g.ne(0).any() for g in gradients)
    for x, y in zip(gradients, expected, strict=True):
        assert torch.equal(x, y)
    torch.testing.assert_close(apart.loss, together.loss)
    for name in ("policy", "value"):
        x, y = getattr(apart, name), getattr(together, name)
        assert x.loss == y.loss and x.stats == y.stats


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_one_role_that_trains_alone_is_stepped(tmp_path, role):
    live = trainer(tmp_path, critic="adapter", total_episodes=32)
    live.backbone.train_roles(role)
    assert shares(live.backbone, live.config) == ("both",)
    before = [p.detach().clone() for p in live.backbone.parameters()]
    live.step(1, next(iter(live.batches())))
    moved = {
        name
        for (name, p), old in zip(live.backbone.named_parameters(), before, strict=True)
        if not torch.equal(p, old)
    }
    assert moved and all(
        ("critic" in name or "value_head" in name) == (role == "critic") for name in moved
    )


def test_a_shared_critic_and_steps_in_the_backward_have_one():
    assert shares(moved_policy(), CONFIG) == ("both",)
    own = moved_policy("adapter")
    assert shares(own, GRPOConfig()) == ("both",)  # it has no critic
    stepped = replace(
        ADAPTER, optimizer_in_backward=True, microbatch_tokens=10**4, num_mini_batches=64
    )
    assert shares(own, stepped) == ("both",)


def test_the_trainer_makes_the_shares_one_after_the_other(tmp_path, monkeypatch):
    made = []

    def recorded(*given):
        made.append(given[-1])
        return microbatch_loss(*given)

    def gathered(*given):
        made.append("gather")
        return gather(*given)

    monkeypatch.setattr("fastrlhf.experience.microbatch_loss", recorded)
    monkeypatch.setattr("fastrlhf.experience.gather", gathered)
    trainer(tmp_path, critic="adapter", total_episodes=32).train()
    # Without a trunk cache, gathering runs the frozen layers: once for both.
    assert len(made) > 12 and made == ["gather", "policy", "value"] * (len(made) // 3)


def full(train_layers="all", **changes) -> SharedBackbone:
    second = {"reference_model": tiny.model(**changes)} if train_layers == "all" else {}
    backbone = SharedBackbone(
        tiny.model(**changes), lora=None, train_layers=train_layers, critic="shared", **second
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return backbone


@pytest.mark.parametrize(("layers", "tied"), [("all", True), ("all", False), (2, False)])
def test_the_heads_gradient_is_summed_in_its_place(monkeypatch, layers, tied):
    backbone = full(layers, tie_word_embeddings=tied)
    experience = learnable(backbone, sample_rollout(backbone), CONFIG)
    given = []

    def recorded(*arguments, **options):
        given.append(options["weight_grad"])
        return kernel(*arguments, **options)

    kernel = losses.linear_policy_loss
    monkeypatch.setattr(losses, "linear_policy_loss", recorded)
    loss, gradients = differentiated(backbone, experience, CONFIG, ("both",))
    assert len({id(x) for x in given}) == 1 and given[0] is not None
    monkeypatch.setattr(losses, "head_gradient", lambda *_: None)
    expected, separate = differentiated(backbone, experience, CONFIG, ("both",))
    assert given[-1] is None
    torch.testing.assert_close(loss.loss, expected.loss)
    for x, y in zip(gradients, separate, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * float(y.abs().max()))


def test_it_is_not_where_it_would_be_wrong():
    config = replace(CONFIG, use_peft=False, train_layers="all")
    backbone = full()
    stepped = replace(
        config, optimizer_in_backward=True, microbatch_tokens=10**4, num_mini_batches=64
    )
    assert head_gradient(backbone, stepped) is None
    with torch.no_grad():
        assert head_gradient(backbone, config) is None
    assert head_gradient(moved_policy(), CONFIG) is None  # the head is frozen
    assert backbone.head.weight.grad is None
    assert head_gradient(backbone, config) is backbone.head.weight.grad
    assert head_gradient(full().bfloat16(), config) is None
    turned = full(tie_word_embeddings=False)
    turned.head.weight.data = turned.head.weight.data.T.contiguous().T
    assert head_gradient(turned, config) is None
