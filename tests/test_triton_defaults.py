"""torch's default dtype is the caller's business: nothing Triton's backend gives hangs on it.

Under a default of float64 or bfloat16, a buffer that is made without a dtype is not float32, and a
kernel reads and writes it as if it were.
"""

import pytest
import torch

from fastrlhf_kernels import PolicyLossSpec, linear_policy_loss, policy_loss
from fastrlhf_kernels._head import HeadInputs, HeadOptions

pytest.importorskip("triton")

from fastrlhf_kernels import _triton_advantages, _triton_sampling, _triton_tokens
from fastrlhf_kernels._triton_head import head_statistics
from fastrlhf_kernels._triton_head_gradient import head_gradients

pytestmark = pytest.mark.interpret


@pytest.fixture
def p(head_problem, device):
    problem = head_problem(6, 16, 131).to(torch.float32)
    return type(problem)(**{name: x.to(device) for name, x in vars(problem).items()})


def fused(p):
    leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    out = linear_policy_loss(
        leaves[0], leaves[1], p.targets, p.old_logprobs, p.advantages, p.mask, PolicyLossSpec(),
        bias=leaves[2], backend="triton",
    )  # fmt: skip
    return [out.loss, *out.stats, *torch.autograd.grad(out.loss, leaves)]


def head(p):
    rows = torch.arange(6, device=p.hidden.device)
    temperature = torch.ones_like(p.advantages)
    inputs = HeadInputs(p.hidden, p.weight, p.bias, p.targets, temperature, None, None, None)
    options = HeadOptions(1.0, None, "forward", 131, 2**20)
    table, extra = head_statistics(inputs, rows, options, extra=True)
    coefficients = p.hidden[:, :3].contiguous()
    gradients = head_gradients(inputs, rows, options, table, coefficients, (True, True, True))
    return [table, extra, *gradients]


def advantages(p):
    values, mask = p.hidden[:, :8], p.hidden[:, 8:] > -1
    gae = _triton_advantages.gae(p.hidden[:, 8:], values, mask, 0.99, 0.95)
    return [*gae, _triton_advantages.whiten(values, mask, True)]


def tokens(p):
    mask = p.mask.reshape(2, 3)
    logprobs = p.old_logprobs + 0.1 * p.advantages
    given = [x.reshape(2, 3) for x in (logprobs, p.old_logprobs, p.advantages)]
    spec = PolicyLossSpec(aggregation="sequence_mean")
    out = policy_loss(*given, mask, spec, backend="triton")
    values = _triton_tokens.value_rows(logprobs, p.old_logprobs, p.advantages, p.mask, 0.2)
    return [out.loss, out.stats.ratio, values]


def samples(p):
    uniform = torch.full_like(p.advantages, 0.4)
    return _triton_sampling.sample(p.hidden, torch.ones_like(uniform), uniform, 0, 1.0)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("run", [fused, head, advantages, tokens, samples])
def test_the_default_dtype_changes_nothing(p, run, default):
    expected = run(p)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        got = run(p)
    finally:
        torch.set_default_dtype(before)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())
