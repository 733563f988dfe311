"""The setting `audit`: no tensor as large as the vocabulary but in the head's workspace."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from fastrlhf_kernels import forbid_vocab_tensors

from .backbone import SharedBackbone
from .config import PPOConfig

__all__ = ["audited"]


def audited(backbone: SharedBackbone, config: PPOConfig) -> AbstractContextManager:
    """Under `audit`, refuse vocab-sized tensors beyond the head's workspace.

    Within the block they raise `fastrlhf_kernels.VocabTensorError`.
    """
    if not config.audit:
        return nullcontext()
    return forbid_vocab_tensors(
        # Half the workspace is the larger of its two buffers of logits.
        config.workspace_mb * 2**19,
        vocab_sizes={backbone.head.weight.shape[0]},
        exempt=backbone.parameters(),
    )
