"""`linear_policy_loss(weight_grad=…)`: the weight's gradient is added where it is summed anyway."""

from dataclasses import replace

import pytest
import torch
from backends import ON_CPU, cpu_only
from test_linear_policy_loss import SPECS, WORKSPACE_MB, fused

from fastrlhf_kernels import PolicyLossSpec, linear_policy_loss
from fastrlhf_kernels.audit import VocabTensorError, forbid_vocab_tensors

SPEC = SPECS["ppo with everything"]


def loss_of(p, weight, hidden, weight_grad, spec=SPEC, **options):
    return linear_policy_loss(
        hidden, weight, p.targets, p.old_logprobs, p.advantages, p.mask, spec, bias=p.bias,
        ref_hidden=p.ref_hidden, ref_weight=p.ref_weight, ref_bias=p.ref_bias,
        weight_grad=weight_grad, workspace_mb=WORKSPACE_MB, **options,
    ).loss  # fmt: skip


def leaves(p):
    """The problem with a bias that trains, a weight and hidden states that do."""
    weight, hidden, bias = (x.detach().requires_grad_() for x in (p.weight, p.hidden, p.bias))
    return replace(p, bias=bias), weight, hidden


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", ["ppo with everything", "gspo", "k2"])
def test_it_is_the_gradient_that_backward_would_give(head_problem, backend, name, relative_rms):
    p, spec = head_problem().to(torch.float32), SPECS[name]
    options = {"sequence_ids": torch.arange(p.mask.numel()) // 5} if name == "gspo" else {}
    _, (on_hidden, on_weight, on_bias) = fused(p, spec, backend=backend, **options)
    p, weight, hidden = leaves(p)
    there = 1e-4 * torch.randn_like(weight)
    total = there.clone()
    loss_of(p, weight, hidden, total, spec, backend=backend, **options).backward()
    assert relative_rms(total - there, on_weight) < 1e-5
    assert weight.grad is None
    for ours, theirs in ((hidden.grad, on_hidden), (p.bias.grad, on_bias)):
        assert relative_rms(ours, theirs) < 1e-6
    # Twice the gradient would be seen.
    assert relative_rms(total - there, 2 * on_weight) > 0.1


@pytest.mark.parametrize("backend", ON_CPU)
def test_microbatches_of_a_tied_weight_add_up_in_its_own_gradient(
    head_problem, backend, relative_rms
):
    p = head_problem(12).to(torch.float32)
    count = int(p.mask.sum())

    def summed(parts, at_once):
        weight = p.weight.detach().requires_grad_()
        for rows in parts:
            q = p.rows(rows)
            if at_once and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            hidden = weight[q.targets] * 0.5 + q.hidden
            total = weight.grad if at_once else None
            loss_of(q, weight, hidden, total, num_items=count, backend=backend).backward()
        return weight.grad

    whole, parts = [slice(0, 12)], [slice(0, 5), slice(5, 12)]
    expected = summed(whole, at_once=False)
    assert relative_rms(summed(whole, at_once=True), expected) < 1e-6
    assert relative_rms(summed(parts, at_once=True), expected) < 2e-6


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_weight_that_does_not_train_is_left_alone(head_problem, backend):
    p = head_problem().to(torch.float32)
    total = torch.zeros_like(p.weight)
    hidden = p.hidden.detach().requires_grad_()
    loss_of(p, p.weight.detach(), hidden, total, backend=backend).backward()
    with torch.no_grad():
        loss_of(p, p.weight.detach().requires_grad_(), hidden, total, backend=backend)
    assert total.eq(0).all() and hidden.grad.ne(0).any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_weight_that_trains_alone(head_problem, backend, relative_rms):
    p = head_problem().to(torch.float32)
    (on_weight,) = fused(p, SPEC, backend=backend, requires=("weight",))[1]
    total = torch.zeros_like(p.weight)
    weight = p.weight.detach().requires_grad_()
    loss_of(p, weight, p.hidden.detach(), total, backend=backend).backward()
    assert relative_rms(total, on_weight) < 1e-6


@cpu_only
def test_a_bfloat16_weight_has_a_float32_sum(head_problem, relative_rms):
    p = head_problem().to(torch.bfloat16)
    truth = fused(p, SPEC, backend="cpu")[1][1]
    p, weight, hidden = leaves(p)
    total = torch.zeros(weight.shape)
    loss_of(p, weight, hidden, total).backward()
    # The other way it is rounded at the end.
    assert relative_rms(total, truth) < 4e-3 and total.bfloat16().eq(truth).all()
    assert hidden.grad.dtype == p.bias.grad.dtype == torch.bfloat16


@cpu_only
def test_what_cannot_be_right_is_refused(head_problem):
    p = head_problem().to(torch.float32)
    p, weight, hidden = leaves(p)
    total = torch.zeros_like(weight)
    with pytest.raises(ValueError, match=r"multiplied by 0\.5.*leave weight_grad out"):
        (0.5 * loss_of(p, weight, hidden, total)).backward()
    loss = loss_of(p, weight, hidden, total)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already called"):
        loss.backward()
    for wrong in (total.double(), total[1:], torch.zeros(weight.shape[::-1]).T):
        with pytest.raises(ValueError, match=r"weight_grad is torch\.float"):
            loss_of(p, weight, hidden, wrong)


@cpu_only
def test_no_second_tensor_of_the_weights_size_is_made(head_problem):
    p = head_problem().to(torch.float32)
    p, weight, hidden = leaves(p)
    total, vocab = torch.zeros_like(weight), len(weight)
    # Less than the weight: what allocates one of its size is found, unless it is exempt by shape.
    budget = weight.numel() * 4 - 1

    def run(weight_grad):
        limits = forbid_vocab_tensors(budget, vocab_sizes={vocab})
        with limits:
            loss_of(p, weight, hidden, weight_grad, PolicyLossSpec(kl_coef=0.1)).backward()

    run(total)
    with pytest.raises(VocabTensorError):
        run(None)
