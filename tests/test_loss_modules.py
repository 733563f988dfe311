"""The modules are the ops: to the last bit, with the same gradients, on every kind of head."""

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves

import fastrlhf
from fastrlhf import LinearLogprobs, LinearPolicyLoss, PolicyLoss, ValueLoss
from fastrlhf.loss_modules import head_tensors
from fastrlhf_kernels import (
    PolicyLossSpec,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
    value_loss,
)

OPTIONS = dict(temperature=0.8, logit_scale=0.7, softcap=20.0, valid_vocab=900, workspace_mb=2.0)
SPEC = PolicyLossSpec(kl_coef=0.1, kl_estimator="exact", entropy_coef=0.01)


def linear(weight, bias=None) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.weight = nn.Parameter(weight.clone())
    if bias is not None:
        head.bias = nn.Parameter(bias.clone())
    return head


@pytest.fixture
def batch(head_problem):
    """[B, T] rows whose targets lie in the valid vocabulary."""
    problem = head_problem(12).to(torch.float32)
    rows = {
        name: getattr(problem, name).reshape(3, 4, *getattr(problem, name).shape[1:])
        for name in ("hidden", "ref_hidden", "old_logprobs", "advantages", "targets", "mask")
    }
    rows["targets"] = rows["targets"] % 900
    head = linear(problem.weight, problem.bias)
    ref_head = linear(problem.ref_weight, problem.ref_bias).requires_grad_(False)
    return rows, head, ref_head


def gradients(loss, hidden, head):
    leaves = [hidden, head.weight, head.bias]
    return torch.autograd.grad(loss, leaves)


def same(got, want):
    """Two records of tensors agree to the last bit."""
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert a is b is None or torch.equal(a, b) or bool(a.isnan() & b.isnan())


def test_linear_policy_loss(batch):
    rows, head, ref_head = batch
    hidden = rows["hidden"].requires_grad_()
    tokens = [rows[x] for x in ("targets", "old_logprobs", "advantages", "mask")]
    got = LinearPolicyLoss(SPEC, **OPTIONS)(
        hidden, head, *tokens, ref_hidden=rows["ref_hidden"], ref_head=ref_head, num_items=7
    )
    want = linear_policy_loss(
        hidden, head.weight, *tokens, SPEC, bias=head.bias, ref_hidden=rows["ref_hidden"],
        ref_weight=ref_head.weight, ref_bias=ref_head.bias, num_items=7, **OPTIONS,
    )  # fmt: skip
    same(got, want)
    same(gradients(got.loss, hidden, head), gradients(want.loss, hidden, head))


def test_linear_logprobs_keeps_the_batch(batch):
    rows, head, ref_head = batch
    hidden = rows["hidden"].requires_grad_()
    given = dict(ref_hidden=rows["ref_hidden"], stats=("is_top1",))
    got = LinearLogprobs(**OPTIONS)(hidden, head, rows["targets"], ref_head=ref_head, **given)
    want = linear_logprobs(
        hidden, head.weight, rows["targets"], bias=head.bias, ref_weight=ref_head.weight,
        ref_bias=ref_head.bias, **given, **OPTIONS,
    )  # fmt: skip
    same([*got[:3], *got.extra.values()], [*want[:3], *want.extra.values()])
    assert got.logprobs.shape == got.kl.shape == got.extra["is_top1"].shape == (3, 4)
    same(gradients(got.logprobs.sum(), hidden, head), gradients(want.logprobs.sum(), hidden, head))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_policy_loss(batch, aggregation):
    rows, _, _ = batch
    spec = PolicyLossSpec(aggregation=aggregation)
    given = [rows["old_logprobs"] + 0.1, *(rows[x] for x in ("old_logprobs", "advantages", "mask"))]
    same(PolicyLoss(spec)(*given), policy_loss(*given, spec))


def test_value_loss(batch):
    rows, _, _ = batch
    given = [rows[x] for x in ("advantages", "old_logprobs", "advantages", "mask")]
    got = ValueLoss(0.1)(*given, num_items=5)
    same(got, value_loss(*given, cliprange_value=0.1, num_items=5))


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap", "valid_vocab"])
def test_every_option_arrives(batch, name):
    rows, head, _ = batch
    changed = dict(temperature=0.9, logit_scale=0.9, softcap=1.0, valid_vocab=950)[name]
    results = [
        LinearLogprobs(**OPTIONS | change)(rows["hidden"], head, rows["targets"]).logprobs
        for change in ({}, {name: changed})
    ]
    assert not torch.equal(*results)


def test_heads_that_are_taken(batch):
    rows, head, _ = batch
    embedding = nn.Embedding(*head.weight.shape, _weight=head.weight.detach())
    without_bias = linear(head.weight.detach())
    loss = LinearLogprobs()
    results = [
        loss(rows["hidden"], x, rows["targets"]).logprobs
        for x in (without_bias, embedding, without_bias.weight)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(16, 64, bias=False)


def test_heads_that_are_refused():
    for quantised in (
        bitsandbytes.nn.Linear4bit(16, 64, bias=False),
        bitsandbytes.nn.Linear8bitLt(16, 64, bias=False, has_fp16_weights=False),
        nn.Parameter(torch.zeros(64, 16).to(torch.float8_e4m3fn), requires_grad=False),
    ):
        with pytest.raises(TypeError, match=r"is quantised.*llm_int8_skip_modules"):
            head_tensors(quantised)
    adapted = get_peft_model(Model(), LoraConfig(target_modules=["lm_head"])).model.lm_head
    with pytest.raises(TypeError, match="carries an adapter"):
        head_tensors(adapted)
    with pytest.raises(TypeError, match=r"Model has none; pass model\.lm_head"):
        head_tensors(Model())


def test_the_modules_hold_no_state_and_say_what_they_are():
    for module in (LinearPolicyLoss(SPEC), LinearLogprobs(), PolicyLoss(SPEC), ValueLoss()):
        assert not list(module.parameters()) and not module.state_dict()
        assert "(" in repr(module)
    assert "kl_coef=0.1" in repr(LinearPolicyLoss(SPEC))
    assert set(fastrlhf.__all__) == set(fastrlhf.HOMES)
