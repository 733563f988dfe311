"""Scores on held-out prompts: the same prompts and the same seeds before and after training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .backbone import SharedBackbone
from .config import PPOConfig
from .data import PromptSet
from .errors import UserError
from .experience import score
from .microbatches import cut
from .out_of_memory import MicrobatchBudget, sampled
from .rewards.functions import RewardScorer
from .rewards.shaping import eos_penalty
from .rollout.decode import DecodeEngine
from .text_figures import distinct
from .types import Experience, Rollout

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What the policy does on held-out prompts."""

    score: float  # mean over completions
    kl: float | None  # exact, nats a sequence, mean over sequences; None without a reference
    entropy: float  # nats a token, mean over sampled tokens
    distinct_2: float  # distinct word bigrams over word bigrams, in all completions; 1 without any
    scores: Sequence[float | None]  # None where the reward did not judge
    prompts: Sequence[str]
    completions: Sequence[str]
    told: Sequence[Mapping[str, Any]]  # the columns that the engine adds to a prompt's, as `mode`


def evaluate(
    engine: DecodeEngine,
    backbone: SharedBackbone,
    reward: RewardScorer,
    held_out: PromptSet,
    config: PPOConfig,
    budget: MicrobatchBudget | None = None,
) -> Evaluation:
    """Sample one completion a prompt with the run's seed and judge them.

    Args:
        budget: of tokens a microbatch, which is the run's where it has been halved.
    """
    prompts = held_out.batch(backbone.device)
    # Seeds of training batches are not these: no evaluation draw is a training draw.
    generator = torch.Generator(backbone.device).manual_seed(config.seed + 1_000_003)
    # Prompts of a dataset of their own are all taken.
    own = len(prompts) != config.eval_prompts
    change = "give fewer rows in eval_dataset" if own else "lower eval_prompts"
    rollout = sampled(lambda: engine.generate(prompts, generator), len(prompts), change)
    scores = eos_penalty(reward(rollout), rollout.ended, config.missing_eos_penalty)
    judged = scores[~scores.isnan()]
    if not len(judged):
        raise UserError("the reward returned None for every held-out prompt; nothing to compare")
    experience = score_all(backbone, rollout, config, budget or MicrobatchBudget(config))
    mask = experience.response_mask
    return Evaluation(
        score=float(judged.mean()),
        kl=None if experience.kl is None else float((experience.kl * mask).sum(-1).mean()),
        entropy=float(experience.entropy[mask].mean()),
        distinct_2=distinct(rollout.completions, 2),
        scores=[None if math.isnan(score) else score for score in scores.tolist()],
        prompts=prompts.texts,
        completions=rollout.completions,
        told=[{k: row[k] for k in getattr(engine, "told", ())} for row in rollout.prompts.columns],
    )


def score_all(
    backbone: SharedBackbone, rollout: Rollout, config: PPOConfig, budget: MicrobatchBudget
) -> Experience:
    rows = torch.arange(len(rollout.tokens))
    return budget.run(
        lambda tokens: cut(rollout.sequences, rows, config.microbatching, tokens),
        lambda layouts: score(backbone, rollout, layouts, config),
        # A smaller microbatch would be too small for the update.
        lambda: not config.optimizer_in_backward,
    )
