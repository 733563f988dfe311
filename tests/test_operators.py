"""The custom operators: registered as torch wants them, and whole under torch.compile.

`aot_eager` traces and differentiates as the default compiler does, without generating code.
"""

from importlib import import_module

import pytest
import torch

from fastrlhf_kernels import PolicyLossSpec, _cpu, linear_logprobs, linear_policy_loss, logprobs

pytestmark = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")
SPEC = PolicyLossSpec(kl_coef=0.1, entropy_coef=0.01)


class Recorded:
    """Keeps the arguments that an operator is called with."""

    def __init__(self, monkeypatch, module, name):
        self.operator, self.calls = getattr(module, name), []
        monkeypatch.setattr(module, name, self)

    def __call__(self, *arguments):
        self.calls.append([x.detach() if isinstance(x, torch.Tensor) else x for x in arguments])
        return self.operator(*arguments)


def linear(p, with_reference=True):
    ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight} if with_reference else {}
    targets = p.targets.masked_fill(~p.mask, -100)
    out = linear_logprobs(p.hidden, p.weight, targets, bias=p.bias, **ref, backend="cpu")
    return out.logprobs.sum() + (out.entropy * p.advantages).sum()


def policy(p, spec=SPEC, **options):
    return linear_policy_loss(
        p.hidden, p.weight, p.targets, p.old_logprobs, p.advantages, p.mask, spec, bias=p.bias,
        ref_hidden=p.ref_hidden, ref_weight=p.ref_weight, backend="cpu", **options,
    ).loss  # fmt: skip


def summed(p, **options):
    return policy(p, weight_grad=torch.zeros(p.weight.shape), **options)


def plain(p, **options):
    logits = p.hidden @ p.weight.T
    ref = p.ref_hidden @ p.ref_weight.T
    out = logprobs(logits, p.targets, ref_logits=ref, backend="cpu", **options)
    return (out.logprobs + out.entropy + out.kl).sum()


def sequences(p):
    spec = PolicyLossSpec(loss="gspo", aggregation="sequence_mean")
    return policy(p, spec, sequence_ids=torch.arange(p.mask.numel()) // 5)


CALLS = {
    "linear_logprobs": linear,
    "linear_logprobs alone": lambda p: linear(p, with_reference=False),
    "linear_policy_loss": policy,
    "gspo": sequences,
    "num_items": lambda p: policy(p, num_items=torch.tensor(20)),
    "logprobs": plain,
}


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_compilation_changes_nothing(head_problem, name):
    def run(function):
        p = head_problem().to(torch.float32)
        leaves = [x.requires_grad_() for x in (p.hidden, p.weight)]
        loss = function(p)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    eager = run(CALLS[name])
    torch.compiler.reset()
    compiled = run(torch.compile(CALLS[name], fullgraph=True, backend="aot_eager"))
    for x, y in zip(eager, compiled, strict=True):
        assert torch.equal(x, y)


OPERATORS = {
    "linear_logprobs": ("linear_logprobs", "_forward", linear, (0, 1, 2)),
    "linear_logprobs_backward": ("linear_logprobs", "_backward", linear, ()),
    "linear_policy_loss": ("linear_policy_loss", "_forward", policy, (0, 1, 2)),
    "linear_policy_loss_": ("_policy_loss_operator", "_forward_", summed, ()),
    "logprobs": ("logprobs", "_forward", plain, (0,)),
    "logprobs_backward": ("logprobs", "_backward", plain, ()),
    "logprobs_backward_": (
        "logprobs", "_backward_", lambda p: plain(p, inplace_backward=True), (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(head_problem, monkeypatch, name):
    module, attribute, function, leaves = OPERATORS[name]
    p = head_problem().to(torch.float32)
    wanted = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    recorded = Recorded(monkeypatch, import_module(f"fastrlhf_kernels.{module}"), attribute)
    torch.autograd.grad(function(p), wanted, allow_unused=True)
    (arguments,) = recorded.calls
    for index in leaves:
        arguments[index] = arguments[index].requires_grad_()
    torch.library.opcheck(recorded.operator, tuple(arguments))


def test_operators_that_wait_for_the_device_are_in_no_cuda_graph():
    """They look for the rows that train, which a graph that is being recorded cannot."""
    namespace = torch.ops.fastrlhf
    for name in (
        "linear_logprobs", "linear_logprobs_backward", "linear_policy_loss", "linear_policy_loss_",
    ):  # fmt: skip
        assert torch.Tag.cudagraph_unsafe in getattr(namespace, name).default.tags
    assert torch.Tag.cudagraph_unsafe not in namespace.logprobs.default.tags
