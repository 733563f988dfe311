"""What linear_policy_loss does on the `triton` backend beside what its own tests ask of every one.

Operands whose layout or dtype is not what the kernels read.
"""

from dataclasses import replace

import pytest
import torch

from fastrlhf_kernels import PolicyLossSpec, linear_policy_loss

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
