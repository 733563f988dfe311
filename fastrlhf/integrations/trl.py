"""Our fused head under TRL's GRPO, RLOO, DPO, KTO and SFT trainers.

`trl.trainer.utils._ChunkedLogProbFunction` is where all five turn hidden states into
log-probabilities, entropies and the statistics that they log; it is looked up at each step, so
trainers that exist already are patched too. The second symbol, `trl.trainer.utils._use_triton`,
says whether rows without a label are left out: TRL leaves them out on CUDA and XPU only, patched
on a CPU too.

Supports TRL 1.16.x (pip install '.[trl]'), tried with 1.16.0; other versions are refused.
Deviations from TRL's op: logits are float32 also where hidden states, weights or autocast are
bfloat16 (TRL rounds them); `chunk_size` is not used, the workspace is ours; the head's gradient is
summed in float32, and under autocast rounded once to its type (TRL rounds the terms, not the sum).

SFT with label smoothing or a `compute_loss_func` makes its loss from logits, which no op replaces;
only the metrics run on ours. Not patched, because they do not use the op: DistillationTrainer (its
own chunked divergence), RewardTrainer (no language-model head) and trl.experimental. DeepSpeed
ZeRO-3 is refused: it takes the head's weight away between forward and backward.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastrlhf_kernels import linear_logprobs

from . import Applied, Package, Patch, Replacement

__all__ = ["ChunkedLogProbs", "patch", "unpatch"]

TRL = Package("trl", series="1.16", tried=("1.16.0",))
SIGNATURE = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
    "final_logit_softcapping", "logit_scale", "outputs",
)  # fmt: skip
STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbs:
    """`fastrlhf_kernels.linear_logprobs` with the call and the results of TRL's autograd function.

    `apply` is all that TRL calls.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Collection[str] = ("entropy", *STATISTICS),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """`(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1)`, each [N].

        hidden: [N, D]; weight: [V, D]; bias: [V]; targets: [N] int64. What `outputs` does not name
        is None, logprobs apart. is_top1 is bool, the rest float32; the last three have no gradient.
        Raises RuntimeError under DeepSpeed ZeRO-3.
        """
        if getattr(weight, "ds_status", None) is not None:
            raise RuntimeError(
                "fastrlhf's op cannot run under DeepSpeed ZeRO-3, which takes the head's weight "
                "away before the backward; use ZeRO-2 or FSDP2, or call "
                "fastrlhf.integrations.trl.unpatch()"
            )
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            # The operands as autocast gives them to a Linear; the logits stay in float32.
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            found = linear_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                logit_scale=logit_scale,
                temperature=temperature,
                softcap=final_logit_softcapping,
                stats=[name for name in STATISTICS if name in outputs],
            )
        entropy = found.entropy if "entropy" in outputs else None
        squares, mean_logits, is_top1 = (found.extra.get(name) for name in STATISTICS)
        return (
            found.logprobs,
            entropy,
            squares,
            mean_logits,
            None if is_top1 is None else is_top1.bool(),
        )


def _replacements() -> list[Replacement]:
    TRL.require()
    utils = import_module("trl.trainer.utils")

    original, uses_triton = utils._ChunkedLogProbFunction, utils._use_triton
    TRL.expect("trl.trainer.utils._ChunkedLogProbFunction", original.forward, SIGNATURE)

    def leaves_rows_out(device: torch.device) -> bool:
        return device.type == "cpu" or uses_triton(device)

    def owners() -> list[ModuleType]:
        return [utils]

    return [
        Replacement(owners, "_ChunkedLogProbFunction", original, ChunkedLogProbs),
        Replacement(owners, "_use_triton", uses_triton, leaves_rows_out),
    ]


_PATCH = Patch(_replacements)


def patch() -> Applied:
    """Put our op under TRL's trainers until `unpatch()`, or for the length of `with patch():`.

    Patching twice changes nothing, and a `with` inside a patched program leaves it patched. Raises
    ImportError for a TRL that is missing or not 1.16.x, RuntimeError where the op is not TRL's own.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Put TRL's own objects back; without `patch()`, change nothing."""
    _PATCH.undo()
