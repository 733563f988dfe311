"""Which settings to change so that a run fits a budget, the cheapest changes first.

`STEPS` is their order: what costs time alone, then what trains less, then what is stored with fewer
bits, then what makes the run smaller. A step is taken as far as it must be, as far as it goes where
that is not enough, and not at all where it saves nothing. The steps are gone through until none
saves more; in the end those that proved unnecessary are taken back. Every configuration that is
advised has been planned and fits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from .architectures import architecture
from .config import PPOConfig
from .errors import UserError
from .memory import MemoryPlan, card, plan, size

__all__ = ["Change", "Fitting", "automatic", "fit"]

AUTOMATIC = ("microbatch_tokens", "gradient_checkpointing", "train_layers", "quantization")
"""what `--auto` may change"""


@dataclass(frozen=True)
class Change:
    """A setting, what it becomes, and the bytes that this saves on top of the changes before."""

    setting: str
    value: Any
    saves: int

    def __str__(self) -> str:
        # As it is written in a recipe and on the command line.
        value = self.value if isinstance(self.value, str) else json.dumps(self.value)
        return f"{self.setting}={value}"


@dataclass(frozen=True)
class Fitting:
    """A configuration that fits, and how it came about."""

    config: PPOConfig
    plan: MemoryPlan
    changes: tuple[Change, ...]  # in the order of what they cost; empty: it fitted as it was

    def table(self) -> str:
        """The changes as lines of text."""
        return "\n".join(f"  {x!s:36}saves {size(x.saves)}" for x in self.changes)


def halves(value: int, least: int) -> list[int]:
    """value/2, value/4, ... as far as ``least``, which ends it."""
    found = []
    while value > least:
        value = max(least, value // 2)
        found.append(value)
    return found


def batch_sizes(config: PPOConfig) -> list[int]:
    fitting = [n for n in halves(config.batch_size, 1) if config.batch_size % n == 0]
    parts = (config.num_mini_batches, config.num_generations)
    return [n for n in fitting if not any(n % part for part in parts)]


@dataclass(frozen=True)
class Scene:
    """What a step looks at beside the configuration."""

    depth: int  # layers of the model
    length: int  # tokens of a sequence
    device: str
    trunk_bytes: int


Values = Callable[[PPOConfig, Scene], Sequence[Any]]

# Each setting with the values that save more and more; those that change nothing are passed over.
STEPS: dict[str, Values] = {
    "microbatch_tokens": lambda c, s: (
        [] if c.optimizer_in_backward else halves(c.microbatch_tokens, s.length)
    ),
    "gradient_checkpointing": lambda c, s: [True],
    "trunk_cache_mb": lambda c, s: (
        [s.trunk_bytes >> 21, 0] if s.device != "cpu" and s.trunk_bytes else []
    ),
    "workspace_mb": lambda c, s: halves(c.workspace_mb, 16),
    "eval_prompts": lambda c, s: [c.batch_size] if c.eval_prompts > c.batch_size else [],
    "optim": lambda c, s: ["adamw_8bit"],
    "bf16": lambda c, s: [True],
    "train_layers": lambda c, s: halves(s.depth if c.train_layers == "all" else c.train_layers, 1),
    "lora_rank": lambda c, s: halves(c.lora_rank, 4) if c.use_peft else [],
    "use_peft": lambda c, s: [True],
    "quantization": lambda c, s: ["int8", "nf4"] if c.use_peft else [],
    "reference_quantization": lambda c, s: ["int8", "nf4"],
    "batch_size": lambda c, s: batch_sizes(c),
    "response_length": lambda c, s: halves(c.response_length, min(c.response_length, 16)),
}


class Search:
    """Plans configurations of one model for one budget; a plan that fails fits nothing."""

    def __init__(
        self,
        config: PPOConfig,
        budget: int,
        model_config: PreTrainedConfig | None,
        device: str,
        prompt_length: int,
    ):
        self.model_config = model_config or architecture(config.model)
        self.budget, self.device, self.prompt_length = budget, device, prompt_length
        self.plans: dict[PPOConfig, MemoryPlan] = {}
        # The values that each setting was tried with, in the order in which they save more.
        self.tried: dict[str, list[Any]] = {}
        self.original = self.config = config
        self.plan = self.planned(config)

    def planned(self, config: PPOConfig) -> MemoryPlan:
        if config not in self.plans:
            self.plans[config] = plan(
                config, model_config=self.model_config, device=self.device,
                prompt_length=self.prompt_length,
            )  # fmt: skip
        return self.plans[config]

    def scene(self) -> Scene:
        depth = self.model_config.get_text_config().num_hidden_layers
        length = self.prompt_length + self.config.response_length
        trunk = self.plan.components.get("trunk cache", 0)
        return Scene(depth, length, self.device, trunk)

    def attempt(self, **changes: Any) -> tuple[PPOConfig, MemoryPlan] | None:
        """The configuration with changes, planned; None where the settings do not allow them."""
        try:
            changed = replace(self.config, **changes)
            return changed, self.planned(changed)
        except UserError:
            return None

    def step(self, setting: str, value: Any) -> tuple[PPOConfig, MemoryPlan] | None:
        changes = {setting: value}
        if setting == "batch_size":
            # Otherwise the evaluation would be the larger rollout, and nothing would be saved.
            changes["eval_prompts"] = min(value, self.config.eval_prompts)
        return self.attempt(**changes)

    def take(self, setting: str) -> bool:
        """Change ``setting`` to its first value that fits, or to the last; False: saves nothing."""
        values = STEPS[setting](self.config, self.scene())
        values = [x for x in values if x != getattr(self.config, setting)]
        found = self.step(setting, values[-1]) if values else None
        if found is None or found[1].needed >= self.plan.needed:
            return False
        ladder = self.tried.setdefault(setting, [])
        ladder += [x for x in values if x not in ladder]
        low, high = 0, len(values) - 1
        if found[1].fits(self.budget):
            while low < high:
                middle = (low + high) // 2
                tried = self.step(setting, values[middle])
                if tried is not None and tried[1].fits(self.budget):
                    found, high = tried, middle
                else:
                    low = middle + 1
        self.config, self.plan = found
        return True

    def search(self, settings: Sequence[str]) -> Fitting:
        takes = True
        # What saves nothing while another phase is the peak may save when that has become smaller.
        while takes and not self.plan.fits(self.budget):
            takes = False
            for setting in settings:
                if not self.plan.fits(self.budget):
                    takes |= self.take(setting)
        if not self.plan.fits(self.budget):
            raise UserError(self.too_little())
        self.take_back()
        return Fitting(self.config, self.plan, self.changes())

    def changed(self) -> dict[str, Any]:
        """The settings that are not as they were, cheapest first."""
        now = {setting: getattr(self.config, setting) for setting in STEPS}
        return {k: value for k, value in now.items() if value != getattr(self.original, k)}

    def take_back(self) -> None:
        """Undo what later changes have made unnecessary, the dearest first, or as much of it."""
        for setting, value in reversed(self.changed().items()):
            if self.goes_back(setting, getattr(self.original, setting)):
                continue
            ladder = self.tried.get(setting, [])
            for milder in reversed(ladder[: ladder.index(value)] if value in ladder else []):
                if not self.goes_back(setting, milder):
                    break

    def goes_back(self, setting: str, value: Any) -> bool:
        """Set ``setting`` to a value that saves less, if it fits."""
        changes = {setting: value}
        if setting == "batch_size":
            # No more prompts than a batch has: they are planned with it.
            changes["eval_prompts"] = min(value, self.original.eval_prompts)
        found = self.attempt(**changes)
        if found is None or not found[1].fits(self.budget):
            return False
        self.config, self.plan = found
        return True

    def changes(self) -> tuple[Change, ...]:
        """The changes, each with what it saves once those before it are made."""
        made: list[Change] = []
        so_far, needed = {}, self.planned(self.original).needed
        for setting, value in self.changed().items():
            so_far[setting] = value
            try:
                left = self.planned(replace(self.original, **so_far)).needed
            except UserError:
                left = needed  # goes with a later change alone, which is said to save it all
            made.append(Change(setting, value, needed - left))
            needed = left
        return tuple(made)

    def too_little(self) -> str:
        changes = " ".join(str(Change(*x, 0)) for x in self.changed().items())
        return (
            f"{size(self.budget)} is too little for {self.config.model}: give at least "
            f"{size(round_up(card(self.plan.needed, self.device)))}"
            + (f", with {changes}" if changes else "")
        )


def round_up(count: int) -> int:
    """The next hundredth of a GiB, so that what is printed is enough."""
    unit = 2**30 // 100
    return -(-count // unit) * unit + unit


def fit(
    config: PPOConfig,
    budget: int,
    *,
    model_config: PreTrainedConfig | None = None,
    device: str = "cuda",
    prompt_length: int = 256,
    settings: Sequence[str] = tuple(STEPS),
) -> Fitting:
    """The cheapest changes that make ``config`` fit ``budget`` bytes.

    Args:
        settings: what may be changed, in the order in which it is tried.

    Raises:
        UserError: it does not fit whatever is changed; says which budget would do.
    """
    search = Search(config, budget, model_config, device, prompt_length)
    return search.search(settings)


def automatic(
    config: PPOConfig,
    budget: int,
    *,
    model_config: PreTrainedConfig | None = None,
    device: str = "cuda",
    prompt_length: int = 256,
) -> Fitting:
    """Pick the microbatch, the trained layers and the quantisation for a budget.

    Where the configuration fits as it is, its microbatch grows as far as there is room.

    Raises:
        UserError: as `fit`.
    """
    given: dict[str, Any] = {
        "model_config": model_config, "device": device, "prompt_length": prompt_length,
    }  # fmt: skip
    found = fit(config, budget, **given, settings=AUTOMATIC)
    if found.changes:
        return found
    whole = (config.batch_size // config.num_mini_batches) * (
        prompt_length + config.response_length
    )
    while found.config.microbatch_tokens < whole:
        larger = replace(
            found.config, microbatch_tokens=min(whole, 2 * found.config.microbatch_tokens)
        )
        planned = plan(larger, **given)
        if not planned.fits(budget):
            break
        change = Change(
            "microbatch_tokens", larger.microbatch_tokens, found.plan.needed - planned.needed
        )
        found = Fitting(larger, planned, (change,))
    return found
