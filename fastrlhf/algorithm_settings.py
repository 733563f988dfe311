"""What a run's algorithm is told: the settings that `PPOConfig` inherits, and each row's defaults.

No torch is imported here: a typo on the command line is told before it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .errors import UserError

if TYPE_CHECKING:
    from .config import PPOConfig

__all__ = [
    "BY_ALGORITHM",
    "DEFAULTS",
    "GROUP_ALGORITHMS",
    "TRL_NAMES",
    "AlgorithmSettings",
    "check_algorithm",
    "require",
]

AlgorithmName = Literal[
    "reinforce", "a2c", "ppo", "ppo_kl", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"
]

# A field with this default takes the value that its algorithm has in DEFAULTS.
BY_ALGORITHM: Any = object()

ON_POLICY = dict(
    num_generations=1, scale_rewards="none", whiten_advantages=False, num_ppo_epochs=1,
    cliprange=0.2, cliprange_high=None, cliprange_value=None, kl_coef=0.05, kl_estimator="exact",
    critic=None, dynamic_sampling=0, overlong_share=0.0,
)  # fmt: skip
PPO = ON_POLICY | dict(
    whiten_advantages=True, num_ppo_epochs=4, cliprange_value=0.2, critic="shared"
)
GROUP = ON_POLICY | dict(
    num_generations=8, scale_rewards="group", kl_coef=0.0, kl_estimator="k3"
)  # fmt: skip

DEFAULTS: dict[str, dict[str, Any]] = {
    "reinforce": ON_POLICY,
    "a2c": ON_POLICY | dict(critic="shared"),
    "ppo": PPO,
    "ppo_kl": PPO,
    "rloo": ON_POLICY | dict(num_generations=2, kl_estimator="k1"),
    "grpo": GROUP,
    "dr_grpo": GROUP | dict(scale_rewards="none"),
    "dapo": GROUP | dict(cliprange_high=0.28, dynamic_sampling=3, overlong_share=0.2),
    "gspo": GROUP | dict(cliprange=3e-4, cliprange_high=4e-4),
    "cispo": GROUP | dict(cliprange=1.0, cliprange_high=4.0),
}
GROUP_ALGORITHMS = ("rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo")
CLIPPED = ("ppo", "rloo", "grpo", "dr_grpo", "dapo")

# Who reads a setting that not every algorithm reads: elsewhere it would say nothing.
READ_BY: dict[str, tuple[str, ...]] = {
    "baseline": ("reinforce",),
    "baseline_constant": ("reinforce",),
    "baseline_decay": ("reinforce",),
    "dual_clip": CLIPPED,
    "old_kl_coef": ("ppo_kl",),
    "old_kl_target": ("ppo_kl",),
    "whiten_rewards": ("reinforce", "a2c", "ppo", "ppo_kl"),
}

# What users of TRL call a setting, and its name here.
TRL_NAMES = {
    "epsilon": "cliprange",
    "epsilon_high": "cliprange_high",
    "delta": "dual_clip",
    "beta": "kl_coef",
    "loss_type": "algorithm",
    "num_iterations": "num_ppo_epochs",
    "normalize_advantages": "whiten_advantages",
    "max_completion_length": "response_length",
    "vf_coeff": "vf_coef",
}


@dataclass(frozen=True)
class AlgorithmSettings:
    """The algorithm and what belongs to it; docs/math.md, section 9, has the table."""

    algorithm: AlgorithmName = "ppo"
    """The row of the table of algorithms. What it decides has its value where nothing else is
    said."""
    num_generations: int = BY_ALGORITHM
    """Completions sampled for a prompt: batch_size = prompts · num_generations. 8; rloo: 2; 1
    without groups."""
    baseline: Literal["none", "constant", "batch_mean", "moving_average", "value"] = "batch_mean"
    """What reinforce subtracts from the returns."""
    baseline_constant: float = 0.0
    """The constant of baseline: constant."""
    baseline_decay: float = 0.9
    """How much of its past the moving average keeps at each rollout."""
    scale_rewards: Literal["group", "batch", "none"] = BY_ALGORITHM
    """By whose standard deviation a group's advantages are divided. group; dr_grpo, rloo: none."""
    whiten_advantages: bool = BY_ALGORITHM
    """Give advantages mean 0 and deviation 1 over the rollout's tokens. ppo, ppo_kl: true."""
    cliprange_high: float | None = BY_ALGORITHM
    """The ratio is clipped above at 1 + this. None: cliprange; dapo: 0.28; gspo: 4e-4; cispo: 4."""
    dual_clip: float | None = None
    """Bounds the ratio of tokens with a negative advantage; above 1. None: no bound."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive`: kl_coef, its start, is steered so that the KL settles at kl_target."""
    kl_target: float = 6.0
    """Nats a sequence that the adaptive controller aims at."""
    kl_horizon: float = 10000.0
    """Episodes in which the adaptive controller may change kl_coef by 20 %; scale it to the run."""
    old_kl_coef: float = 1.0
    """ppo_kl: the penalty's first weight; it doubles or halves as the steps miss old_kl_target."""
    old_kl_target: float = 0.01
    """ppo_kl: nats a token between the policies before and after the update of a rollout."""
    target_kl: float | None = None
    """Once the policy is farther than this from the one that sampled (approx_kl, nats a token), the
    rollout is done with. None: no bound."""
    kl_limit: float | None = None
    """The run ends when the KL to the reference exceeds this, nats a sequence. None: no bound."""
    hacking: Literal["warn", "raise_kl", "stop"] = "warn"
    """What a sign of reward hacking does (docs/reward_hacking.md): it is told, and no more; it
    raises kl_coef by a quarter a rollout; or it ends the run."""
    gold: str | None = None
    """A reward to watch by and never to train on, named as `reward` is. None: no such judge."""
    dynamic_sampling: int = BY_ALGORITHM
    """How often groups whose scores are all equal are replaced by groups of fresh prompts; those
    left over train nothing. dapo: 3; 0: such groups are kept, their advantages are 0."""
    old_logprobs: Literal["scored", "sampled"] = "scored"
    """`scored`: a rollout is run through the policy again, which finds its exact entropy and, with
    a reference, its exact KL. `sampled`: sampling's own log-probabilities stand, nothing is run
    again, there is no reference, and the entropy is that of the sample; needs kl_coef 0 and no
    critic."""
    overlong_share: float = BY_ALGORITHM
    """Last share of response_length in which a score falls, by up to 1. dapo: 0.2."""

    family: ClassVar[tuple[str, ...]] = tuple(
        DEFAULTS
    )  # the algorithms that this class may be asked for

    def row(self) -> dict[str, Any]:
        """The algorithm's defaults."""
        with_values = self.algorithm == "reinforce" and self.baseline == "value"
        return DEFAULTS[self.algorithm] | (dict(critic="shared") if with_values else {})

    def fill_in(self) -> None:
        """Give the fields that the caller left out the values of the algorithm's row."""
        if self.algorithm not in self.family:
            allowed = " or ".join(self.family)
            raise UserError(f"algorithm: {self.algorithm!r} does not fit; it must be {allowed}")
        row = self.row()
        for field in fields(self):
            if getattr(self, field.name) is BY_ALGORITHM:
                object.__setattr__(self, field.name, row[field.name])


def check_algorithm(config: PPOConfig) -> None:
    """Raise UserError for settings that contradict the algorithm or each other."""
    for name in ("kl_target", "kl_horizon", "old_kl_target"):
        require(getattr(config, name) > 0, f"{name} must be above 0")
    for name in ("old_kl_coef", "dynamic_sampling"):
        require(getattr(config, name) >= 0, f"{name} must not be negative")
    for name in ("cliprange_high", "cliprange_value", "target_kl", "kl_limit"):
        value = getattr(config, name)
        require(value is None or value > 0, f"{name} must be above 0, or null")
    require(config.dual_clip is None or config.dual_clip > 1, "dual_clip must be above 1, or null")
    require(0 <= config.baseline_decay < 1, "baseline_decay must be at least 0 and below 1")
    require(0 <= config.overlong_share <= 1, "overlong_share must lie between 0 and 1")
    require(
        config.overlong_share == 0 or config.stop_token == "eos",
        "overlong_share needs stop_token: eos; without one every response is as long; set it to 0",
    )
    require(
        config.kl_controller == "fixed" or config.kl_coef > 0,
        "kl_controller: adaptive multiplies kl_coef, which must be above 0",
    )
    require(
        config.hacking != "raise_kl" or (config.kl_coef > 0 and config.kl_controller == "fixed"),
        "hacking: raise_kl multiplies a kl_coef above 0 that nothing else steers; set kl_coef, and "
        "kl_controller: fixed",
    )
    check_old_logprobs(config)
    check_generations(config)
    for name, readers in READ_BY.items():
        is_default = getattr(config, name) == type(config).__dataclass_fields__[name].default
        require(
            is_default or config.algorithm in readers,
            f"{name} is read by {', '.join(readers)}, not by {config.algorithm}; leave it out",
        )
    has_ratio = config.algorithm not in ("reinforce", "a2c")
    require(
        config.num_ppo_epochs == 1 or has_ratio,
        f"{config.algorithm} has no ratio to correct later epochs with; set num_ppo_epochs to 1",
    )
    steps = config.num_ppo_epochs * config.num_mini_batches
    require(
        config.algorithm != "ppo_kl" or steps > 1,
        "ppo_kl adapts to the KL that a rollout's earlier steps have caused, and there is one step "
        "a rollout; set num_ppo_epochs or num_mini_batches to 2 or more",
    )
    needed = config.row()["critic"] is not None
    require(
        config.critic is not None or not needed,
        f"{config.algorithm} needs a critic: 'shared' or 'adapter'",
    )
    require(
        config.critic is None or needed,
        f"{config.algorithm} has no critic; leave critic out or set it to null",
    )


def check_old_logprobs(config: PPOConfig) -> None:
    require(
        config.old_logprobs == "scored"
        or (config.kl_coef == 0 and config.kl_limit is None and config.critic is None),
        "old_logprobs: sampled leaves KL and values unknown, which kl_coef, kl_limit and a critic "
        "need; set old_logprobs to scored",
    )
    require(
        config.old_logprobs == "scored" or config.engine == "fastrlhf",
        "old_logprobs: sampled takes the sampler's word, and another engine's is off by its own "
        "rounding; set engine to fastrlhf or old_logprobs to scored",
    )


def check_generations(config: PPOConfig) -> None:
    by_groups = config.algorithm in GROUP_ALGORITHMS
    least = 2 if by_groups else 1
    why = f": {config.algorithm} compares completions of one prompt" if by_groups else ""
    require(config.num_generations >= least, f"num_generations must be at least {least}{why}")
    require(
        by_groups or config.dynamic_sampling == 0,
        f"dynamic_sampling replaces groups, and {config.algorithm} has none; set it to 0",
    )


def require(holds: bool, message: str) -> None:
    """Raise UserError with ``message`` unless ``holds``."""
    if not holds:
        raise UserError(message)
