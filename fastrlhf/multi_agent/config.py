"""What a training of several agents is told, beside what every run is told.

No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..algorithm_settings import require
from ..config import PPOConfig

__all__ = ["MultiAgentConfig"]


UNREAD = (
    "missing_eos_penalty", "overlong_share", "reward_weights", "reward_bounds", "reward_clip",
    "reward_scaling", "reward_normalization", "dynamic_sampling",
)  # fmt: skip
"""what shapes the scores of a reward; a game's payoffs are taken as they are"""


@dataclass(frozen=True)
class MultiAgentConfig(PPOConfig):
    """Settings of a run in which agents learn from dialogues; an episode is a dialogue.

    The game says what PPOConfig's dataset, reward, response_length and stop_token say elsewhere:
    these are not read. Nobody watches for reward hacking: the game has its own figures.
    """

    algorithm: Literal["reinforce", "ppo"] = "reinforce"
    """The row of the table of algorithms with which each agent learns. `ppo`: one value head reads
    the states of whichever agent learns."""
    baseline: Literal["none", "constant", "batch_mean", "moving_average", "value"] = (
        "moving_average"
    )
    """What reinforce subtracts from an agent's returns; each agent has its own."""
    batch_size: int = 32
    """Dialogues a round."""
    learners: str | list = "all"
    """Which agents learn: `all`, or a list of names. The others stay what they are."""
    pool_share: float = 0.5
    """Share of a round's dialogues in which one learner plays against past selves of the others;
    the learners take turns, and of such a dialogue that one alone learns."""
    pool_sampling: Literal["uniform", "recent"] = "uniform"
    """Which past selves are met: each as often, or each half as often as the one after it."""
    pool_size: int = 8
    """Past selves that are met, the newest ones; those before stay in the run's folder."""
    snapshot_steps: int = 5
    """Rounds between past selves; the untrained agents are the first."""
    matrix_games: int = 32
    """Dialogues of each pair of past selves in the win-rate matrix at the end. 0: no matrix."""

    family: ClassVar[tuple[str, ...]] = ("reinforce", "ppo")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.pool_share <= 1, "pool_share must lie between 0 and 1")
        for name in ("pool_size", "snapshot_steps"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        require(self.matrix_games >= 0, "matrix_games must not be negative")
        require(
            self.engine == "fastrlhf",
            "other engines sample as one policy only; set engine to fastrlhf",
        )
        require(self.num_generations == 1, "dialogues have no groups; set num_generations to 1")
        require(
            not self.save_best,
            "agents have no common best: what one wins another may lose; leave save_best out, "
            "every past self is in the run's folder",
        )
        require(
            self.hacking == "warn" and self.gold is None,
            "hacking and gold watch the texts of one reward, and agents are paid by their game; "
            "leave them out",
        )
        for name in UNREAD:
            require(
                getattr(self, name) in (getattr(PPOConfig, name), 0, None),
                f"{name} shapes a reward's scores, and agents are paid by their game as they are; "
                "leave it out",
            )
        named = self.learners == "all" or (isinstance(self.learners, list) and self.learners)
        require(bool(named), "learners must be 'all' or a list of agents")
