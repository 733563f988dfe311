"""The ops on one number a token, `policy_loss`, `value_loss`, `gae` and `whiten`, and `AdamW8bit`.

Floor: copying as many bytes as the op has to read and write. The vectors of a rollout fit in a
cache and cost calls more than bytes; the ratio to the floor says so.
"""

from collections.abc import Callable

import op_peers as peers
import torch
from measure import Call, Problem
from plan import DTYPES, ROLLOUT, SHAPES, Group
from torch import Tensor

from fastrlhf_kernels import AdamW8bit, PolicyLossSpec, gae, policy_loss, value_loss, whiten

OURS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
GAMMA, LAM, CLIP, CLIP_VALUE = 0.99, 0.95, 0.2, 0.2

Tensors = tuple[Tensor, ...]


def _copy(count: int, device: str) -> Callable[[], Call]:
    """A copy that reads and writes `count` bytes together."""

    def make() -> Call:
        source = torch.randint(0, 255, (max(1, count // 2),), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: (target.copy_(source),)

    return make


def _eager_policy(values: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = (values - old).exp()
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return (losses * mask).sum() / mask.sum()


def _eager_value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clipped = values.clamp(old - CLIP_VALUE, old + CLIP_VALUE)
    losses = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (losses * mask).sum() / mask.sum()


def _eager_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensors:
    """For sequences that are masked at their ends only, as TRL's PPO trainer wrote it."""
    rewards, values = rewards * mask, values * mask
    last = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(last)
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], 1)
    return advantages * mask, (advantages + values) * mask


def _eager_whiten(x: Tensor, mask: Tensor) -> Tensor:
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / (mask.sum() - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def problem(group: Group, device: str) -> Problem:
    if group.op == "AdamW8bit":
        return _optimizer(group, device)
    sequences, length = ROLLOUT
    x, y, z = (torch.randn(sequences, length, device=device) for _ in range(3))
    lengths = torch.randint(length // 2, length + 1, (sequences, 1), device=device)
    mask = torch.arange(length, device=device) < lengths
    leaf = x.clone().requires_grad_()
    near = x + 0.1 * y

    def differentiated(loss: Tensor) -> Tensors:
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    spec = PolicyLossSpec()
    ours: dict[str, Callable[[str], Tensors]] = {
        "policy_loss": lambda backend: differentiated(
            policy_loss(leaf, near, z, mask, spec, backend=backend).loss
        ),
        "value_loss": lambda backend: differentiated(
            value_loss(leaf, near, z, mask, cliprange_value=CLIP_VALUE, backend=backend).loss
        ),
        "gae": lambda backend: gae(x, y, mask, gamma=GAMMA, lam=LAM, backend=backend),
        "whiten": lambda backend: (whiten(x, mask, backend=backend),),
    }
    eager: dict[str, Callable[..., Tensor | Tensors]] = {
        "policy_loss": _eager_policy, "value_loss": _eager_value, "gae": _eager_gae,
        "whiten": _eager_whiten,
    }  # fmt: skip
    given: dict[str, Tensors] = {
        "policy_loss": (leaf, near, z, mask), "value_loss": (leaf, near, z, mask),
        "gae": (x, y, mask), "whiten": (x, mask),
    }  # fmt: skip

    def call_of(function: Callable[..., Tensor | Tensors]) -> Call:
        def call() -> Tensors:
            out = function(*given[group.op])
            if isinstance(out, Tensor):
                return differentiated(out) if out.requires_grad else (out,)
            return out

        return call

    calls: dict[str, Callable[[], Call]] = {
        "eager": lambda: call_of(eager[group.op]),
        **{
            name: lambda name=name: lambda: ours[group.op](name)  # type: ignore[misc]
            for name in OURS[device]
        },
    }
    if group.op != "gae":  # whose loop of 1,024 steps takes minutes to compile
        calls["torch.compile"] = lambda: call_of(peers.compiled(eager[group.op]))
    # Inputs and outputs of one float32 a token each, and a byte of mask.
    vectors = {"policy_loss": 4, "value_loss": 4, "gae": 4, "whiten": 2}[group.op]
    calls["copy"] = _copy((4 * vectors + 1) * x.numel(), device)
    return Problem(calls, {"copy": 1}, sizes={"N": x.numel(), "D": None, "V": None})


def _optimizer(group: Group, device: str) -> Problem:
    """A step on one matrix of the model's MLP, [intermediate, D]."""
    shape, dtype = SHAPES[group.shape], DTYPES[group.dtype]
    assert shape.hidden is not None and shape.intermediate is not None

    def step(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Call:
        weight = torch.randn(shape.intermediate, shape.hidden, device=device).to(dtype)
        weight.requires_grad_()
        weight.grad = 0.01 * torch.randn_like(weight)
        optimizer = make([weight])

        def call() -> Tensors:
            optimizer.step()
            return ()

        return call

    def eager(fused: bool) -> Call:
        return step(lambda weights: torch.optim.AdamW(weights, lr=1e-3, fused=fused))

    def bitsandbytes() -> Call:
        peers.require("bitsandbytes")
        from bitsandbytes import optim

        return step(lambda weights: optim.AdamW8bit(weights, lr=1e-3))

    calls: dict[str, Callable[[], Call]] = {
        "eager": lambda: eager(fused=False),
        "eager fused": lambda: eager(fused=True),
        OURS[device][0]: lambda: step(lambda weights: AdamW8bit(weights, lr=1e-3)),
        "bitsandbytes": bitsandbytes,
    }
    count = shape.intermediate * shape.hidden
    # Weight and two bytes of state read and written, the gradient read.
    calls["copy"] = _copy(count * (3 * dtype.itemsize + 4), device)
    sizes = {"N": shape.intermediate, "D": shape.hidden, "V": None}
    return Problem(calls, {"copy": 1}, truth=None, sizes=sizes)
