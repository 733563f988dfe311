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


def run(p, device, backend="triton", *, spec=None, **options):
    """Loss, statistics and gradients."""
    leaves = {name: getattr(p, name).detach().to(device).requires_grad_() for name in LEAVES}
    tokens = [x.to(device) for x in (p.targets, p.old_logprobs, p.advantages, p.mask)]
    out = linear_policy_loss(
        leaves["hidden"], leaves["weight"], *tokens, spec or PolicyLossSpec(), bias=leaves["bias"],
        backend=backend, **options,
    )  # fmt: skip
    return out.loss.detach(), out.stats, torch.autograd.grad(out.loss, list(leaves.values()))


def test_a_bias_may_have_any_stride(head_problem, device):
    p = head_problem(6, 16, 131).to(torch.float32)
    loss, _, gradients = run(p, device)
    wide = torch.full((131, 2), 50.0)
    wide[:, 0] = p.bias
    got, _, own = run(replace(p, bias=wide[:, 0]), device)
    assert torch.equal(got, loss)
    assert all(torch.equal(x, y) for x, y in zip(own, gradients, strict=True))
