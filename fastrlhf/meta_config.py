"""What a meta-training is made of: `PPOConfig` with an outer loop around it.

No torch is imported here: a typo is told before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .algorithm_settings import DEFAULTS, AlgorithmName, require
from .config import PPOConfig

__all__ = ["MetaConfig", "check_length"]


@dataclass(frozen=True)
class MetaConfig(PPOConfig):
    """Settings of a meta-training; those of `PPOConfig` are the adaptation's to one task.

    Where `PPOConfig` says run, in `warmup_steps` and `lr_scheduler_type`, it is one adaptation;
    where it says rollouts between evaluations or checkpoints, they are meta steps here.
    """

    algorithm: AlgorithmName = "rloo"
    """The row of the table of algorithms by which a task is adapted to."""
    lr_scheduler_type: Literal["linear", "constant"] = "constant"
    """`constant`, or `linear`: to zero over an adaptation of inner_steps."""

    method: Literal["reptile", "fomaml"] = "reptile"
    """How the initialisation learns from an adaptation: `reptile` moves it towards the adapted
    weights; `fomaml` applies the gradient at the adapted weights, on one more rollout, to it."""
    meta_steps: int = 20
    """Changes of the initialisation in the whole run."""
    meta_batch_size: int = 4
    """Tasks that a meta step learns from."""
    inner_steps: int = 4
    """Rollouts, with their optimizer steps, of an adaptation to a task."""
    meta_learning_rate: float | None = None
    """`reptile`: the share of the way to the adapted weights. `fomaml`: the learning rate of an
    AdamW of the make `optim`. None: 1 for reptile, learning_rate for fomaml."""
    meta_lr_scheduler_type: Literal["linear", "constant"] = "linear"
    """`linear`: to zero over the run."""
    eval_adaptation: int | None = None
    """Rollouts of the adaptations by which evaluations judge the initialisation. None:
    inner_steps."""
    eval_every: int = 1
    """Rollouts between evaluations along such an adaptation."""
    total_episodes: int = 0
    """What the settings above make: meta_steps · meta_batch_size · rollouts a task · batch_size.
    Leave it out."""

    family: ClassVar[tuple[str, ...]] = tuple(DEFAULTS)

    def __post_init__(self) -> None:
        at_least_one = "meta_steps meta_batch_size inner_steps eval_adaptation eval_every"
        for name in at_least_one.split():
            value = getattr(self, name)
            require(not isinstance(value, int) or value >= 1, f"{name} must be at least 1")
        factors = (self.meta_steps, self.meta_batch_size, self.inner_steps, self.batch_size)
        # What is no number is told of in a sentence of its own.
        if all(type(factor) is int for factor in factors):
            made = self.meta_steps * self.meta_batch_size * self.task_rollouts * self.batch_size
            require(
                self.total_episodes in (0, made),
                f"total_episodes ({self.total_episodes}) is not what meta_steps, meta_batch_size, "
                f"inner_steps and batch_size make ({made}); leave it out, or set it to 0",
            )
            object.__setattr__(self, "total_episodes", made)
        super().__post_init__()
        require(self.outer_rate > 0, "meta_learning_rate must be above 0")
        require(
            self.method != "reptile" or self.outer_rate <= 1,
            "meta_learning_rate is a share of the way in reptile, at most 1",
        )
        require(
            self.hacking == "warn" and self.gold is None,
            "hacking and gold compare a run's rollouts with its first, and meta training begins "
            "again with every task; leave them out",
        )

        check_length(self, "eval_adaptation", self.eval_adaptation or self.inner_steps)

    @property
    def outer_rate(self) -> float:
        """The first learning rate of the outer loop."""
        if self.meta_learning_rate is not None:
            return self.meta_learning_rate
        return 1.0 if self.method == "reptile" else self.learning_rate

    @property
    def task_rollouts(self) -> int:
        """Rollouts that a meta step makes of each of its tasks."""
        return self.inner_steps + (self.method == "fomaml")

    @property
    def steps(self) -> int:
        """Meta steps in the run."""
        return self.meta_steps

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of an adaptation."""
        return self.inner_steps * self.num_ppo_epochs * self.num_mini_batches


def check_length(config: MetaConfig, name: str, rollouts: int) -> None:
    """Raise UserError for an adaptation that would go on when its learning rate has come to 0."""
    require(
        config.lr_scheduler_type == "constant" or rollouts <= config.inner_steps,
        f"{name} is {rollouts}, and lr_scheduler_type linear is at 0 after inner_steps "
        f"({config.inner_steps}); set lr_scheduler_type to constant, or {name} to no more",
    )
