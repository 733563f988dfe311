"""What linear_policy_loss does on the `triton` backend beside what its own tests ask of every one.

Operands whose layout or dtype is not what the kernels read.
"""

from dataclasses import replace

import pytest
import torch

from fastrlhf_kernels import PolicyLossSpec, linear_logprobs, linear_policy_loss
from fastrlhf_kernels.audit import forbid_vocab_tensors

pytest.importorskip("triton")

pytestmark = pytest.mark.interpret
LEAVES = ("hidden", "weight", "bias")


def run(p, device, backend="triton", *, requires=LEAVES, scale=1.0, **options):
    """Loss, statistics, and gradients of `scale` times the loss in `requires`."""
    leaves = {name: getattr(p, name).detach().to(device) for name in LEAVES}
    for name in requires:
        leaves[name].requires_grad_()
    tokens = [x.to(device) for x in (p.targets, p.old_logprobs, p.advantages, p.mask)]
    out = linear_policy_loss(
        leaves["hidden"], leaves["weight"], *tokens, PolicyLossSpec(), bias=leaves["bias"],
        backend=backend, **options,
    )  # fmt: skip
    return (
        out.loss.detach(),
        out.stats,
        torch.autograd.grad(scale * out.loss, [leaves[x] for x in requires]),
    )


def test_a_bias_may_have_any_stride(head_problem, device):
    p = head_problem(6, 16, 131).to(torch.float32)
    loss, _, gradients = run(p, device)
    wide = torch.full((131, 2), 50.0)
    wide[:, 0] = p.bias
    got, _, own = run(replace(p, bias=wide[:, 0]), device)
    assert torch.equal(got, loss)
    assert all(torch.equal(x, y) for x, y in zip(own, gradients, strict=True))


def test_fp16_keeps_gradients_that_are_too_small_for_it(head_problem, relative_rms, device):
    """With 65,536 tokens a probability of 1e-3 gives its logit a gradient of 1.5e-8: 0 in fp16.

    A scaler of the loss comes after the logits' gradient, and cannot help it.
    """
    p = head_problem(9, 32, 1003, scale=0.1).to(torch.float16)
    options = {"num_items": 65_536, "workspace_mb": 0.05, "scale": 65_536.0}
    truth = run(p.to(torch.float64), device, "reference", **options)[2]
    got = run(p, device, **options)[2]
    for x, true in zip(got, truth, strict=True):
        assert x.dtype == torch.float16 and relative_rms(x, true) < 1e-3
    # Where there is no signal there is nothing to scale.
    idle = replace(p, advantages=torch.zeros_like(p.advantages))
    assert all(x.eq(0).all() for x in run(idle, device, **options)[2])


def test_fp16_keeps_them_for_any_loss_of_log_probabilities(head_problem, relative_rms, device):
    """Not of ours: the mean over 4000 tokens, with a probability of 2e-4 each."""
    p = head_problem(9, 64, 5003, scale=0.1)

    def gradients(dtype, backend):
        x, w = (t.to(device, dtype).requires_grad_() for t in (p.hidden.half(), p.weight.half()))
        found = linear_logprobs(x, w, p.targets.to(device), backend=backend)
        return torch.autograd.grad(-found.logprobs.sum() / 4000, (x, w))

    truth = gradients(torch.float64, "reference")
    for x, true, most in zip(gradients(torch.float16, "triton"), truth, (2e-3, 1e-2), strict=True):
        assert x.dtype == torch.float16 and relative_rms(x, true) < most


def test_a_head_of_another_dtype_is_raised_in_slices(head_problem, device):
    p = head_problem(9, 256, 1003, scale=0.1).to(torch.float32)
    p = replace(p, weight=p.weight.bfloat16(), ref_weight=p.ref_weight.half())
    raised = replace(p, weight=p.weight.float(), ref_weight=p.ref_weight.float())
    size = 2**17
    assert size < 4 * p.weight.numel() / 4
    separate = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight, "ref_bias": p.ref_bias}
    options = {name: x.to(device) for name, x in separate.items()}
    for given in (options, {"ref_hidden": options["ref_hidden"]}, {}):
        given = {**given, "workspace_mb": size / 2**20}
        with forbid_vocab_tensors(size, vocab_sizes={1003}) as seen:
            loss, _, (gradient,) = run(p, device, requires=("hidden",), **given)
        assert seen.largest_bytes > 0
        if "ref_weight" in given:
            given["ref_weight"] = given["ref_weight"].float()
        expected_loss, _, (expected,) = run(raised, device, requires=("hidden",), **given)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    # A head that is trained has its gradient in its own dtype.
    own, expected = run(p, device, **given)[2][1], run(raised, device, **given)[2][1]
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(own.float(), expected, rtol=2**-8, atol=1e-6)
