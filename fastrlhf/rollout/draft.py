"""A rollout while it is being sampled: what is known of every sequence so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SelfCheckError
from ..trunk_cache import TrunkCache
from ..types import Prompts, Rollout

__all__ = ["BROKEN", "Draft", "refuse_broken"]

BROKEN = (
    "the policy's logits have NaN or no finite entry, so no token can be drawn; look at the loss "
    "and the gradient norm of the steps before, and lower learning_rate"
)


def refuse_broken(drawn: Sequence[int]) -> None:
    """Raise SelfCheckError where a token is −1: so `sample` marks such a row on a GPU."""
    if min(drawn, default=0) < 0:
        raise SelfCheckError(BROKEN)


@dataclass
class Draft:
    """Prompts, and room for responses of T tokens."""

    prompts: Prompts
    tokens: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool, True on real tokens
    logprobs: Tensor  # [B, T] float32
    ended: Tensor  # [B] bool
    uniform: Tensor  # [B, T] float32 in [0, 1): what token t of sequence b is drawn with
    trunk: TrunkCache | None = None

    @classmethod
    def of(
        cls, prompts: Prompts, response_length: int, padding: int, generator: torch.Generator
    ) -> Draft:
        batch, start = prompts.tokens.shape
        device = prompts.tokens.device
        tokens = torch.full((batch, start + response_length), padding, device=device)
        tokens[:, :start] = prompts.tokens
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, :start] = prompts.attention_mask
        logprobs = torch.zeros(batch, response_length, device=device)
        ended = torch.zeros(batch, dtype=torch.bool, device=device)
        # All at once: a sequence's draws do not depend on when, or beside whom, it is sampled.
        uniform = torch.rand(batch, response_length, generator=generator, device=device)
        return cls(prompts, tokens, mask, logprobs, ended, uniform)

    @property
    def start(self) -> int:
        """Columns of prompt, P."""
        return self.prompts.tokens.shape[1]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def add(self, rows: Tensor, steps: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Token number steps[i] of the sequences ``rows``; all [n]."""
        self.tokens[rows, self.start + steps] = tokens
        self.mask[rows, self.start + steps] = True
        self.logprobs[rows, steps] = logprobs

    def keep_states(self, index: Tensor, states: Tensor, budget_mb: int | None) -> None:
        """States [n, D] of the frozen layers, of the tokens at ``index`` [n] into B·L."""
        if self.trunk is None:
            self.trunk = TrunkCache(
                len(self.tokens), self.length, states.shape[-1], dtype=states.dtype,
                device=states.device, budget_mb=budget_mb,
            )  # fmt: skip
        self.trunk.write_tokens(index, states)

    def finish(self, tokenizer: Any) -> Rollout:
        """The rollout, its responses decoded."""
        response_mask = self.mask[:, self.start :].clone()
        texts = [
            tokenizer.decode(row[kept], skip_special_tokens=True)
            for row, kept in zip(self.tokens[:, self.start :], response_mask, strict=True)
        ]
        return Rollout(
            self.prompts, texts, self.tokens, self.mask, response_mask, self.logprobs, self.ended,
            self.trunk,
        )  # fmt: skip
