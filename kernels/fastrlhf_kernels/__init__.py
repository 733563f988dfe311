"""Fused losses over large vocabularies: log-probability, entropy, exact KL, and PPO's gradient.

Needs torch only. Each op has a readable twin in `fastrlhf_kernels.reference`.
"""

from ._cpu import MissingKernelsWarning
from ._records import LossOutput, LossStats, PolicyLossSpec, TokenLogprobs, ValueStats
from .adamw8bit import AdamW8bit
from .advantages import gae, whiten
from .audit import VocabTensorError, forbid_vocab_tensors
from .linear_logprobs import linear_logprobs
from .linear_policy_loss import linear_policy_loss
from .logprobs import logprobs
from .policy_loss import policy_loss, value_loss
from .sampling import TruncatedSamplingWarning, sample

__all__ = [
    "AdamW8bit",
    "LossOutput",
    "LossStats",
    "MissingKernelsWarning",
    "PolicyLossSpec",
    "TokenLogprobs",
    "TruncatedSamplingWarning",
    "ValueStats",
    "VocabTensorError",
    "forbid_vocab_tensors",
    "gae",
    "linear_logprobs",
    "linear_policy_loss",
    "logprobs",
    "policy_loss",
    "sample",
    "value_loss",
    "whiten",
]
