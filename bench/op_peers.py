"""What others do for the same statistics: eager torch, its compilation, TRL 1.16, Liger.

Each function gives the log-probability of the targets and the entropy. A peer that is not installed
raises Missing with what to install.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from measure import Missing
from torch import Tensor

Statistics = tuple[Tensor, Tensor]
FromLogits = Callable[[Tensor, Tensor], Statistics]
FromHead = Callable[[Tensor, Tensor, Tensor], Statistics]


def require(package: str) -> None:
    if find_spec(package) is None:
        raise Missing(f"{package} is not installed")


def eager_log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def entropy_of(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


def kl_of(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KL(policy‖reference), exact."""
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(-1)


def at_targets(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(-1, targets[:, None]).squeeze(-1)


def eager_statistics(logits: Tensor, targets: Tensor) -> Statistics:
    log_probs = eager_log_probs(logits)
    return at_targets(log_probs, targets), entropy_of(log_probs)


def eager_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Statistics:
    return eager_statistics(hidden @ weight.t(), targets)


def compiled(function: Callable) -> Callable:
    """`torch.compile`, for these sizes alone."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def trl_statistics() -> FromLogits:
    """What TRL's trainers call on logits: a Triton kernel on a GPU, torch elsewhere."""
    require("trl")
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def trl_head() -> FromHead:
    """The function under TRL's fused head, with the chunk that its trainers use."""
    require("trl")
    from trl.trainer import utils

    def statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> Statistics:
        logprobs, entropy, *_ = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
            ("log_probs", "entropy"),
        )  # fmt: skip
        return logprobs, entropy

    return statistics


def liger_head(device: str) -> FromHead:
    """Liger's per-token cross-entropy and entropy."""
    if device == "cpu":
        raise Missing("Liger's kernels need a GPU")
    require("liger_kernel")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> Statistics:
        losses, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, targets, 1.0, -100, 1, True
        )
        return -losses, entropy

    return statistics
