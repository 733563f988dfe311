"""The ops that read logits: `logprobs` and `sample`.

Floors: the statistics read the logits once (twice with a reference); the gradient, written over
them or not, reads and writes as many bytes as a copy. `read` is `logits.sum()`.
"""

from collections.abc import Callable
from dataclasses import replace

import op_peers as peers
import torch
from measure import Call, Problem
from op_peers import Statistics
from plan import DTYPES, LOGITS_KL, SHAPES, Group
from torch import Tensor

from fastrlhf_kernels import logprobs, sample

OURS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


def make_logits(group: Group, device: str) -> Tensor:
    vocab = SHAPES[group.shape].vocab
    assert vocab is not None
    logits = 3 * torch.randn(group.tokens, vocab, device=device)
    return logits.to(DTYPES[group.dtype])


def _without_gradient(function: Callable[[], tuple[Tensor, ...]]) -> Call:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return function()

    return call


def _floors(logits: Tensor) -> dict[str, Callable[[], Call]]:
    def copy() -> Call:
        target = torch.empty_like(logits)
        return lambda: (target.copy_(logits),)

    return {"read": lambda: lambda: (logits.sum(),), "copy": copy}


def _statistics(group: Group, device: str, logits: Tensor, targets: Tensor) -> Problem:
    with_kl = group.variant == LOGITS_KL
    ref = logits + 0.5 * torch.randn_like(logits) if with_kl else None

    def ours(backend: str) -> Call:
        def run() -> tuple[Tensor, ...]:
            out = logprobs(logits, targets, ref_logits=ref, backend=backend)
            return tuple(x for x in out[:3] if x is not None)

        return _without_gradient(run)

    def eager(logits: Tensor, targets: Tensor, ref: Tensor | None) -> tuple[Tensor, ...]:
        log_probs = peers.eager_log_probs(logits)
        statistics = peers.at_targets(log_probs, targets), peers.entropy_of(log_probs)
        if ref is None:
            return statistics
        return *statistics, peers.kl_of(log_probs, peers.eager_log_probs(ref))

    def compiled() -> Call:
        function = peers.compiled(eager)
        return _without_gradient(lambda: function(logits, targets, ref))

    def trl() -> Call:
        function = peers.trl_statistics()
        return _without_gradient(lambda: function(logits, targets))

    calls: dict[str, Callable[[], Call]] = {
        "eager": lambda: _without_gradient(lambda: eager(logits, targets, ref)),
        "torch.compile": compiled,
        **{name: lambda name=name: ours(name) for name in OURS[device]},
        **{name: make for name, make in _floors(logits).items() if name == "read"},
    }
    if not with_kl:
        calls["trl"] = trl
    return Problem(calls, {"read": 2 if with_kl else 1}, tolerance=TOLERANCE[group.dtype])


def _gradient(group: Group, device: str, logits: Tensor, targets: Tensor) -> Problem:
    """d(Σ a·logprob − 0.01·Σ entropy)/d logits."""
    leaf = logits.requires_grad_()
    weights = torch.randn(group.tokens, device=device)

    def gradient(statistics: Callable[[], Statistics]) -> Call:
        def call() -> tuple[Tensor, ...]:
            values, entropy = statistics()
            loss = (weights * values).sum() - 0.01 * entropy.sum()
            return loss.detach(), *torch.autograd.grad(loss, leaf)

        return call

    def compiled() -> Call:
        function = peers.compiled(peers.eager_statistics)
        return gradient(lambda: function(leaf, targets))

    def trl() -> Call:
        function = peers.trl_statistics()
        return gradient(lambda: function(leaf, targets))

    def in_place() -> Call:
        # The result of an operation, as logits are, whose memory the backward may write over.
        given = leaf.mul(1.0)

        def call() -> tuple[Tensor, ...]:
            backend = OURS[device][0]
            values, entropy, *_ = logprobs(given, targets, inplace_backward=True, backend=backend)
            loss = (weights * values).sum() - 0.01 * entropy.sum()
            return loss.detach(), *torch.autograd.grad(loss, given)

        return call

    floors = _floors(logits.detach())
    calls: dict[str, Callable[[], Call]] = {
        "eager": lambda: gradient(lambda: peers.eager_statistics(leaf, targets)),
        "torch.compile": compiled,
        "trl": trl,
        **{
            name: lambda name=name: gradient(lambda: logprobs(leaf, targets, backend=name)[:2])
            for name in OURS[device]
        },
        "in place": in_place,
        **floors,
    }
    size = logits.numel() * logits.element_size() / 2**20
    tolerance = TOLERANCE[group.dtype]
    return Problem(calls, {"read": 1, "copy": 1}, tolerance=tolerance, gradient_mb=size)


def _sampling(group: Group, device: str, logits: Tensor) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def ours(backend: str) -> Call:
        return lambda: sample(logits, generator=generator, backend=backend)

    def eager() -> tuple[Tensor, ...]:
        log_probs = logits.float().log_softmax(-1)
        tokens = torch.multinomial(log_probs.exp(), 1, generator=generator)
        return tokens.squeeze(-1), log_probs.gather(-1, tokens).squeeze(-1)

    calls: dict[str, Callable[[], Call]] = {
        "eager": lambda: _without_gradient(eager),
        **{name: lambda name=name: ours(name) for name in OURS[device]},
        "read": _floors(logits)["read"],
    }
    # Each candidate draws tokens of its own.
    return Problem(calls, {"read": 1}, truth=None)


def problem(group: Group, device: str) -> Problem:
    logits = make_logits(group, device)
    vocab = logits.shape[1]
    targets = torch.randint(0, vocab, (group.tokens,), device=device)
    if group.op == "sample":
        made = _sampling(group, device, logits)
    elif group.mode == "fwd":
        made = _statistics(group, device, logits, targets)
    else:
        made = _gradient(group, device, logits, targets)
    return replace(made, sizes={"N": group.tokens, "D": None, "V": vocab})
