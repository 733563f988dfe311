"""The records that travel through the training loop, one per stage.

Symbols in the shapes: B sequences, P prompt tokens (left-padded), T response tokens
(right-padded), L = P + T, D hidden size. Response token t is predicted from position P + t - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastrlhf_kernels import LossOutput

__all__ = ["Experience", "LossOutput", "Prompts", "Rollout"]


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, tokenised and left-padded."""

    texts: Sequence[str]
    tokens: Tensor  # [B, P] int64
    attention_mask: Tensor  # [B, P] bool, True on real tokens
    columns: Sequence[Mapping[str, Any]]  # B rows: the data set's other columns, for the reward

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Rollout:
    """Prompts with what the policy answered."""

    prompts: Prompts
    completions: Sequence[str]  # B texts, special tokens removed
    tokens: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] bool, True on real tokens of prompt and response
    response_mask: Tensor  # [B, T] bool, True on sampled tokens, the end-of-sequence token included
    rollout_logprobs: Tensor  # [B, T] float32, log-softmax(z / temperature) of the sampled token
    ended: Tensor  # [B] bool, True where the stop token was sampled
    trunk: Tensor | None = None  # [B, L, D] the frozen lower layers' output, where sampling kept it

    @property
    def responses(self) -> Tensor:
        """The sampled tokens, [B, T] int64."""
        return self.tokens[:, self.prompts.tokens.shape[1] :]

    def completion_ids(self) -> list[list[int]]:
        """The sampled tokens of each sequence without padding."""
        return [
            row[mask].tolist() for row, mask in zip(self.responses, self.response_mask, strict=True)
        ]


@dataclass(frozen=True)
class Experience:
    """All that the update reads. Every field has the batch as its first dimension."""

    trunk: Tensor  # [B, L, D] output of the frozen lower layers ([B, L] tokens if run whole)
    attention_mask: Tensor  # [B, L] bool
    responses: Tensor  # [B, T] int64
    response_mask: Tensor  # [B, T] bool, True = trains
    old_logprobs: Tensor  # [B, T] float32
    ref_logprobs: Tensor | None  # [B, T] float32, for the sampled estimators of KL
    ref_hidden: Tensor | None  # [B, T, D] its final states, for the exact KL in the loss
    kl: Tensor  # [B, T] float32, exact KL(policy || reference) in nats
    entropy: Tensor  # [B, T] float32, nats
    values: Tensor  # [B, T] float32
    advantages: Tensor  # [B, T] float32
    returns: Tensor  # [B, T] float32

    def __len__(self) -> int:
        return len(self.responses)

    def select(self, rows: Tensor) -> Experience:
        """The sequences at ``rows`` ([b] int64), in that order."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {k: None if x is None else x[rows] for k, x in columns.items()}
        return Experience(**taken)

    def with_advantages(self, advantages: Tensor, returns: Tensor) -> Experience:
        """The same experience with its advantages and returns filled in."""
        return replace(self, advantages=advantages, returns=returns)

    def judged_by(self, scores: Tensor) -> tuple[Experience, Tensor]:
        """Sequences whose score ([B]) is NaN, which is not judged, train nothing and score 0."""
        mask = self.response_mask & ~scores.isnan()[:, None]
        return replace(self, response_mask=mask), scores.nan_to_num(0.0)

    @staticmethod
    def concatenate(parts: Sequence[Experience], order: Tensor) -> Experience:
        """Join ``parts``, whose sequences are rows ``order`` of a batch, back into batch order."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Experience)}
        joined: dict[str, Any] = {
            k: None if x[0] is None else torch.cat(x) for k, x in columns.items()
        }
        return Experience(**joined).select(torch.argsort(order))
