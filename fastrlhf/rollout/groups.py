"""Prompts in, judged rollouts out; groups without contrast are replaced by fresh ones.

A group, the completions of one prompt, whose scores are all equal teaches nothing. DAPO (Yu et al.
2025, section 3.2) samples until the batch is full of others. Deviations: at most `dynamic_sampling`
rounds, each of as many fresh prompts as groups are missing; groups still missing then train
nothing, unless none is left: a rollout of dull groups is kept whole, its advantages are 0.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..advantages import equal_scores
from ..config import PPOConfig
from ..data import PromptSet
from ..out_of_memory import sampled
from ..rewards.functions import RewardScorer
from ..rewards.shaping import eos_penalty, overlong_penalty
from ..types import Prompts, Rollout
from .decode import DecodeEngine

__all__ = ["GroupSampler", "Sampled", "join"]


class Sampled(NamedTuple):
    """A rollout, its scores, and how the sampling went."""

    rollout: Rollout
    scores: Tensor  # [B] NaN where the sequence is to train nothing
    metrics: dict[str, float]


class GroupSampler:
    """Samples and judges batches of prompts, each prompt `num_generations` times in a row.

    Args:
        prompts: where fresh prompts are drawn from.
        shuffler: draws them.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        reward: RewardScorer,
        prompts: PromptSet,
        shuffler: torch.Generator,
        config: PPOConfig,
    ):
        self.engine = engine
        self.reward = reward
        self.prompts = prompts
        self.shuffler = shuffler
        self.config = config

    def __call__(self, batch: PromptSet, generator: torch.Generator) -> Sampled:
        """``batch`` has each prompt once."""
        size = self.config.num_generations
        rollout, scores = self.sample(batch, generator)
        if size == 1:
            return Sampled(rollout, scores, {})
        dull = equal_scores(scores, size)
        metrics = {
            "group/scores": float(scores.nanmean()),
            "group/zero_std": float(dull.float().mean()),
        }
        if not self.config.dynamic_sampling:
            return Sampled(rollout, scores, metrics)
        resampled = 0
        for _ in range(self.config.dynamic_sampling):
            missing = int(dull.sum())
            if not missing:
                break
            # Two rollouts' caches would not be in the plan: scoring makes the trunk's states anew.
            rollout = replace(rollout, trunk=None)
            fresh, fresh_scores = self.sample(self.draw(missing), generator)
            lively = ~equal_scores(fresh_scores, size)
            resampled += len(lively)
            # As many dull groups go as lively ones come.
            go = dull & (dull.cumsum(0) <= lively.sum())
            kept = rows_of(~go, size), rows_of(lively, size)
            if lively.any():
                rollout = join(rollout, kept[0], fresh, kept[1])
                scores = torch.cat([scores[kept[0]], fresh_scores[kept[1]]])
            dull = equal_scores(scores, size)
        metrics |= {"group/resampled": resampled, "group/dropped": int(dull.sum())}
        if not dull.all():
            scores = scores.masked_fill(dull.repeat_interleave(size), torch.nan)
        return Sampled(rollout, scores, metrics)

    def sample(self, batch: PromptSet, generator: torch.Generator) -> tuple[Rollout, Tensor]:
        size = self.config.num_generations
        repeated = batch.take([i for i in range(len(batch)) for _ in range(size)])
        prompts = repeated.batch(self.engine.backbone.device)
        generate = partial(self.engine.generate, prompts, generator)
        rollout = sampled(generate, len(repeated), "lower batch_size")
        scores = eos_penalty(
            self.reward.train(rollout), rollout.ended, self.config.missing_eos_penalty
        )
        lengths = rollout.response_mask.sum(1)
        limit, share = self.config.response_length, self.config.overlong_share
        return rollout, overlong_penalty(scores, lengths, limit, share)

    def draw(self, count: int) -> PromptSet:
        order = torch.randperm(len(self.prompts), generator=self.shuffler)
        return self.prompts.take(order[:count].tolist())


def rows_of(groups: Tensor, size: int) -> Tensor:
    """The sequences of the groups that are True, [n] int64."""
    return groups.repeat_interleave(size).nonzero().squeeze(1)


def join(a: Rollout, rows_a: Tensor, b: Rollout, rows_b: Tensor) -> Rollout:
    """Rows of two rollouts as one, the shorter prompts padded on the left.

    The frozen layers' output is left out, so that scoring computes it again.
    """
    parts = [take(a, rows_a), take(b, rows_b)]
    width = max(part.prompts.tokens.shape[1] for part in parts)

    def left(name: str, of_prompts: bool = False) -> Tensor:
        columns = []
        for part in parts:
            x = getattr(part.prompts if of_prompts else part, name)
            # What stands at a masked position is never read.
            columns.append(pad(x, (width - part.prompts.tokens.shape[1], 0)))
        return torch.cat(columns)

    prompts = Prompts(
        [text for part in parts for text in part.prompts.texts],
        left("tokens", of_prompts=True),
        left("attention_mask", of_prompts=True),
        [row for part in parts for row in part.prompts.columns],
    )
    return Rollout(
        prompts=prompts,
        completions=[text for part in parts for text in part.completions],
        tokens=left("tokens"),
        attention_mask=left("attention_mask"),
        response_mask=torch.cat([part.response_mask for part in parts]),
        rollout_logprobs=torch.cat([part.rollout_logprobs for part in parts]),
        ended=torch.cat([part.ended for part in parts]),
    )


def take(rollout: Rollout, rows: Tensor) -> Rollout:
    """The sequences at ``rows``, without the frozen layers' output."""
    index, prompts = rows.tolist(), rollout.prompts
    return Rollout(
        Prompts(
            [prompts.texts[i] for i in index],
            prompts.tokens[rows],
            prompts.attention_mask[rows],
            [prompts.columns[i] for i in index],
        ),
        [rollout.completions[i] for i in index],
        rollout.tokens[rows],
        rollout.attention_mask[rows],
        rollout.response_mask[rows],
        rollout.rollout_logprobs[rows],
        rollout.ended[rows],
    )
