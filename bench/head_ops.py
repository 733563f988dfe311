"""The ops that go through the head: `linear_logprobs` and `linear_policy_loss`.

Floors, in products of [N, D] by [D, V], `product` being the bare one into a tensor that is there
already. The statistics take 1. Their gradient has to make the logits again, which the op is not to
hold: 3 with a frozen head, 4 with a trained one. The loss makes its gradient in the forward: 2 and
3; with half the rows without signal 1.5 (frozen), with the reference's logits 3 (frozen).
"""

from collections.abc import Callable
from functools import lru_cache

import op_peers as peers
import torch
from measure import Call, Problem
from op_peers import FromHead
from plan import DTYPES, FROZEN, HALF, HEAD_KL, SHAPES, TRAINED, Group
from torch import Tensor

from fastrlhf_kernels import PolicyLossSpec, linear_logprobs, linear_policy_loss, policy_loss

PRODUCTS = {
    ("linear_logprobs", ""): 1.0,
    ("linear_logprobs", FROZEN): 3.0,
    ("linear_logprobs", TRAINED): 4.0,
    ("linear_policy_loss", FROZEN): 2.0,
    ("linear_policy_loss", TRAINED): 3.0,
    ("linear_policy_loss", HALF): 1.5,
    ("linear_policy_loss", HEAD_KL): 3.0,
}
OURS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
# bfloat16 peers round the logits, whose size here is a few units.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}
KL_COEF = 0.05


@lru_cache(maxsize=1)
def head_weight(shape: str, dtype: str, device: str) -> Tensor:
    """The head of a shape: as large as the rest of a group together, so made once.

    From a seed of its own: hidden states drawn like its first rows would be parallel to them.
    """
    hidden, vocab, _ = SHAPES[shape]
    assert hidden is not None and vocab is not None
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(vocab, hidden, device=device, dtype=DTYPES[dtype], generator=generator)
    return weight.mul_(3 / hidden**0.5)


class Inputs:
    """One group's tensors."""

    def __init__(self, group: Group, device: str) -> None:
        self.weight = head_weight(group.shape, group.dtype, device).detach()
        self.weight.requires_grad_(group.variant == TRAINED)
        vocab, size = self.weight.shape
        count, dtype = group.tokens, DTYPES[group.dtype]
        self.hidden = torch.randn(count, size, device=device).to(dtype)
        self.hidden.requires_grad_(group.mode != "fwd")
        self.targets = torch.randint(0, vocab, (count,), device=device)
        self.ref_hidden = None
        if group.variant == HEAD_KL:
            noise = torch.randn(count, size, device=device)
            self.ref_hidden = (self.hidden.detach() + 0.1 * noise).to(dtype)
        # Not centred, so that the mean loss is no difference of large numbers.
        self.advantages = 1 + torch.randn(count, device=device)
        if group.variant == HALF:
            self.advantages[torch.randperm(count, device=device)[: count // 2]] = 0.0
        self.mask = torch.ones(count, dtype=torch.bool, device=device)
        self.differentiated = [x for x in (self.hidden, self.weight) if x.requires_grad]

    def product(self) -> Call:
        hidden, weight = self.hidden.detach(), self.weight.detach()
        out = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
        return lambda: (torch.mm(hidden, weight.t(), out=out),)


def _old_logprobs(inputs: Inputs) -> Tensor:
    """The policy has moved: about a fifth of the ratios lie outside the clip range.

    None lies near its ends, where rounding would decide whether a row has a gradient.
    """
    with torch.no_grad():
        now = linear_logprobs(inputs.hidden, inputs.weight, inputs.targets).logprobs
    near, far = 0.02 * torch.randn_like(now), 0.6 * torch.randn_like(now).sign()
    return now + torch.where(torch.rand_like(now) < 0.2, far, near)


def _statistics(group: Group, device: str, inputs: Inputs) -> dict[str, Callable[[], Call]]:
    weights = inputs.advantages

    def call_of(head: FromHead) -> Call:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return head(inputs.hidden, inputs.weight, inputs.targets)

        def backward() -> tuple[Tensor, ...]:
            values, entropy = head(inputs.hidden, inputs.weight, inputs.targets)
            loss = (weights * values).sum() - 0.01 * entropy.sum()
            return loss.detach(), *torch.autograd.grad(loss, inputs.differentiated)

        return forward if group.mode == "fwd" else backward

    def ours(backend: str) -> FromHead:
        return lambda *given: linear_logprobs(*given, backend=backend)[:2]

    return {
        "eager": lambda: call_of(peers.eager_head),
        "torch.compile": lambda: call_of(peers.compiled(peers.eager_head)),
        "trl": lambda: call_of(peers.trl_head()),
        "liger": lambda: call_of(peers.liger_head(device)),
        **{name: lambda name=name: call_of(ours(name)) for name in OURS[device]},
    }


def _policy(group: Group, device: str, inputs: Inputs) -> dict[str, Callable[[], Call]]:
    """The peers have statistics only: their loss is the reference's, of [N] vectors."""
    with_kl = group.variant == HEAD_KL
    spec = PolicyLossSpec(kl_coef=KL_COEF if with_kl else 0.0)
    old_logprobs = _old_logprobs(inputs)
    given = (old_logprobs, inputs.advantages, inputs.mask)

    def differentiated(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, inputs.differentiated)

    def ours(backend: str) -> Call:
        return lambda: differentiated(
            linear_policy_loss(
                inputs.hidden, inputs.weight, inputs.targets, *given, spec,
                ref_hidden=inputs.ref_hidden, backend=backend,
            ).loss
        )  # fmt: skip

    def peer(head: FromHead) -> Call:
        def call() -> tuple[Tensor, ...]:
            values, _ = head(inputs.hidden, inputs.weight, inputs.targets)
            return differentiated(policy_loss(values, *given, spec, backend="reference").loss)

        return call

    def eager_loss(
        hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, targets: Tensor, old: Tensor,
        advantages: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        log_probs = peers.eager_log_probs(hidden @ weight.t())
        with torch.no_grad():  # a statistic, as in the op
            entropy = peers.entropy_of(log_probs)
        ratio = (peers.at_targets(log_probs, targets) - old).exp()
        low, high = 1 - spec.cliprange_low, 1 + spec.cliprange_high
        losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        if ref_hidden is not None:
            with torch.no_grad():
                ref_log_probs = peers.eager_log_probs(ref_hidden @ weight.t())
            losses = losses + KL_COEF * peers.kl_of(log_probs, ref_log_probs)
        return losses.mean(), entropy.mean()

    def eager(function: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        return lambda: differentiated(
            function(
                inputs.hidden,
                inputs.weight,
                inputs.ref_hidden,
                inputs.targets,
                old_logprobs,
                inputs.advantages,
            )[0]
        )

    calls: dict[str, Callable[[], Call]] = {
        "eager": lambda: eager(eager_loss),
        "torch.compile": lambda: eager(peers.compiled(eager_loss)),
        **{name: lambda name=name: ours(name) for name in OURS[device]},
    }
    if not with_kl:  # neither has it
        calls["trl"] = lambda: peer(peers.trl_head())
        calls["liger"] = lambda: peer(peers.liger_head(device))
    return calls


def problem(group: Group, device: str) -> Problem:
    inputs = Inputs(group, device)
    if group.op == "linear_policy_loss":
        calls = _policy(group, device, inputs)
    else:
        calls = _statistics(group, device, inputs)
    calls["product"] = inputs.product
    (vocab, size) = inputs.weight.shape
    return Problem(
        calls,
        {"product": PRODUCTS[group.op, group.variant]},
        tolerance=TOLERANCE[group.dtype],
        gradient_mb=sum(x.numel() * x.element_size() for x in inputs.differentiated) / 2**20,
        sizes={"N": group.tokens, "D": size, "V": vocab},
    )
