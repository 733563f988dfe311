"""One agent's learning: `PPOTrainer.step`, on the turns that the agent took.

Scoring, advantages, loss, checks and metrics are PPOTrainer's own. Deviations: turns come played
already, the optimizer is shared by all agents and steps whoever has gradients, and baseline, KL
coefficient and monitor are each agent's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algorithms import ALGORITHMS
from ..backbone import SharedBackbone
from ..barren_rollouts import BarrenRollouts
from ..controllers import AlgorithmState
from ..metrics import PhaseTimer
from ..out_of_memory import MicrobatchBudget
from ..rewards.functions import RewardScorer
from ..rewards.monitor import HackingMonitor
from ..rollout.groups import Sampled
from ..skipped_steps import SkippedSteps
from ..step import Updater
from ..trainer import PPOTrainer
from ..types import Rollout
from .config import MultiAgentConfig

__all__ = ["Learner"]


class Learner(PPOTrainer):
    """An agent that learns.

    Args:
        agent: its name, and its role on the backbone.
        config: response_length is that of its turns.
        updater, budget, skipped, timer, shuffler: the run's, which all agents share.
        begun: whether the agent has been trained before this run.
    """

    # What it is given in place of prompts is sampled already.
    sampler: Any
    schedule: Any

    def __init__(
        self,
        agent: str,
        backbone: SharedBackbone,
        config: MultiAgentConfig,
        *,
        updater: Updater,
        budget: MicrobatchBudget,
        skipped: SkippedSteps,
        timer: PhaseTimer,
        shuffler: torch.Generator,
        begun: bool = False,
    ):
        self.agent, self.backbone, self.config, self.begun = agent, backbone, config, begun
        self.algorithm, self.state = ALGORITHMS[config.algorithm], AlgorithmState.of(config)
        self.updater, self.budget, self.skipped, self.timer = updater, budget, skipped, timer
        self.schedule = updater.schedule
        self.shuffler = self.generator = shuffler
        self.sampler = lambda sampled, generator: sampled
        # The game has judged, and what a text's reward would warn of is ordinary in short turns.
        self.reward = RewardScorer(not_asked)
        self.barren = BarrenRollouts(config, lambda warning: None)
        self.monitor = HackingMonitor(config)

    def learn(self, number: int, turns: Rollout, rewards: Tensor) -> dict[str, Any]:
        """Learn from the turns of round ``number``; the metrics of `PPOTrainer.step`.

        rewards: [B] of each turn, NaN where it is not judged.
        """
        baseline = self.state.returns.value
        trained = self.backbone.trained_roles
        self.backbone.train_roles(self.agent, *(["critic"] if self.config.critic else []))
        try:
            with self.backbone.policy_is(self.agent):
                handed: Any = Sampled(turns, rewards, {})
                line = self.step(number + self.begun, handed)
        finally:
            self.backbone.train_roles(*trained)
        return line | {"turns": int((~rewards.isnan()).sum()), "baseline": baseline}


def not_asked(completions: list[str], **columns: Any) -> list[None]:
    """A reward that judges nothing: each turn has its own from the game."""
    return [None] * len(completions)
