"""The records that travel through the training loop, one per stage.

Symbols in the shapes: B sequences, P prompt tokens (left-padded), T response tokens
(right-padded), L = P + T, D hidden size. Response token t is predicted from position P + t - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from fastrlhf_kernels import LossOutput

from .microbatches import Sequences
from .trunk_cache import TrunkCache

__all__ = ["Experience", "Forward", "LossOutput", "Microbatch", "Prompts", "Rollout"]


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
    trunk: TrunkCache | None = None  # the frozen lower layers' output, where sampling kept it

    @property
    def responses(self) -> Tensor:
        """The sampled tokens, [B, T] int64."""
        return self.tokens[:, self.prompts.tokens.shape[1] :]

    @cached_property
    def sequences(self) -> Sequences:
        """The masks in host memory."""
        return Sequences(self.attention_mask.cpu(), self.response_mask.cpu())

    def completion_ids(self) -> list[list[int]]:
        """The sampled tokens of each sequence without padding."""
        return [
            row[mask].tolist() for row, mask in zip(self.responses, self.response_mask, strict=True)
        ]


@dataclass(frozen=True)
class Experience:
    """All that the update reads, in the batch's order."""

    tokens: Tensor  # [B, L] int64
    trunk: TrunkCache | None  # [B, L, D] output of the frozen lower layers; None: run them again
    sequences: Sequences  # which tokens are real, in host memory
    response_mask: Tensor  # [B, T] bool, True = trains
    old_logprobs: Tensor  # [B, T] float32
    ref_logprobs: Tensor | None  # [B, T] float32, where the KL is a sampled one
    ref_hidden: Tensor | None  # [N, D] the reference's states of all N sampled tokens, in order
    kl: Tensor | None  # [B, T] float32, exact KL(policy || reference) in nats
    entropy: Tensor  # [B, T] float32, nats
    values: Tensor | None  # [B, T] float32, where there is a critic
    advantages: Tensor  # [B, T] float32
    returns: Tensor  # [B, T] float32

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def responses(self) -> Tensor:
        """The sampled tokens, [B, T] int64."""
        return self.tokens[:, -self.response_mask.shape[1] :]

    def with_advantages(self, advantages: Tensor, returns: Tensor) -> Experience:
        """The same experience with its advantages and returns filled in."""
        return replace(self, advantages=advantages, returns=returns)

    def judged_by(self, scores: Tensor) -> tuple[Experience, Tensor]:
        """Sequences whose score ([B]) is NaN, which is not judged, train nothing and score 0."""
        mask = self.response_mask & ~scores.isnan()[:, None]
        return replace(self, response_mask=mask), scores.nan_to_num(0.0)


@dataclass(frozen=True)
class Forward:
    """What the trained layers and the head take of a microbatch: n response tokens in b rows.

    Rows are padded to w and come with a mask, or there is one row of sequences end to end.
    """

    trunk: Tensor  # [b, w, D] output of the frozen lower layers ([b, w] tokens if run whole)
    attention_mask: Tensor | None  # [b, w] bool; None where packed
    position_ids: Tensor | None  # [1, w] int64 where packed: restarts at 0 with each sequence
    state_index: Tensor  # [n] int64, into b·w: the state that predicts each response token
    responses: Tensor  # [n] int64

    def states(self, hidden: Tensor) -> Tensor:
        """The states in which the responses were drawn: [b, w, ...] -> [n, ...]."""
        return hidden.flatten(0, 1).index_select(0, self.state_index)


@dataclass(frozen=True)
class Microbatch(Forward):
    """A microbatch with what its tokens learn from."""

    sequence_ids: Tensor  # [n] int64, the sequence of the rollout that each token belongs to
    response_mask: Tensor  # [n] bool, True = trains
    old_logprobs: Tensor  # [n] float32
    advantages: Tensor  # [n] float32
    returns: Tensor  # [n] float32
    values: Tensor | None = None  # [n] float32
    ref_logprobs: Tensor | None = None  # [n] float32
    ref_hidden: Tensor | None = None  # [n, D]
