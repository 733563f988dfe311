"""What a run will hold in memory, said before it runs: the plan, and what it was in the end.

`plan` needs a configuration and the model's shape, no weights: each phase of the run is gone
through on the meta device (memory_simulation.py), so the plan is of the code that will run.

    planned peak of a phase = tensors alive at once + what libraries add (`LIBRARIES`)

On a GPU a budget is also charged with what is no tensor's (`needed`): the context, and the gaps in
the allocator's blocks. A card gives a process less than it is sold with (`usable`). Sizes are in
units of 1024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .architectures import architecture
from .config import PPOConfig
from .errors import UserError
from .memory_simulation import Simulation

__all__ = ["MemoryPlan", "card", "parse_size", "plan", "planned_and_measured", "size", "usable"]

MIB = 2**20
PHASES = ("load", "evaluate", "rollout", "score", "update")
LIBRARIES = {"cpu": 64 * MIB, "cuda": 16 * MIB}
"""What torch's libraries allocate for themselves, once. On a CPU (measured, bench/plan_check.py):
the tokenizer, buffers of the matrix products, what malloc keeps. On a GPU: cuBLAS' workspaces."""
GPU_CONTEXT = 512 * MIB
"""what a process with loaded kernels takes of a GPU before its first tensor"""
GPU_RESERVED = 16
"""one part in so many of a GPU's memory as sold that the driver and error correction keep: of 16 GB
CUDA shows about 15 (an estimate, on the safe side for most cards)"""
GPU_GAPS = 0.04
"""the share of a peak that lies unused between the blocks of torch's allocator"""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device that computes, for one run."""

    model: str
    device: str  # "cpu" or "cuda"
    prompt_length: int  # tokens of the longest prompt
    components: Mapping[str, int]  # the largest that each gets
    phases: Mapping[str, int]  # peak of each phase, as it is measured
    engine: str = "fastrlhf"  # who samples

    @property
    def needed(self) -> int:
        """What a process must be able to use for every phase to fit."""
        return max(map(self.charged, self.phases))

    def charged(self, phase: str) -> int:
        """What a phase takes of a budget."""
        peak = self.phases[phase]
        return peak if self.device == "cpu" else int(peak * (1 + GPU_GAPS)) + GPU_CONTEXT

    def fits(self, budget: int) -> bool:
        """Whether every phase fits what ``budget``, a GPU's size as sold, leaves a process."""
        return self.needed <= usable(budget, self.device)

    def record(self) -> dict[str, Any]:
        """The plan as data, in bytes."""
        return {
            "model": self.model,
            "device": self.device,
            "prompt_length": self.prompt_length,
            "components": dict(self.components),
            "phases": dict(self.phases),
            "needed": self.needed,
        }

    def table(self, budget: int | None = None, *, assumed: bool = False) -> str:
        """Components and phases as lines of text; ``assumed``: nobody gave the prompts' length."""
        prompts = f"prompts of up to {self.prompt_length} tokens"
        if assumed:
            prompts = f"assumed prompt length {self.prompt_length}: give --prompt-length"
        lines = [f"{self.model} on {self.device}, {prompts}", *self.notes(), ""]
        lines += [row(name, count) for name, count in self.components.items()]
        if self.device != "cpu":
            share = f"each with {size(GPU_CONTEXT)} of context and {GPU_GAPS:.0%} of gaps"
            lines += ["", f"peaks of the phases, {share}"]
        if budget is not None and self.device != "cpu":
            kept = size(budget - usable(budget, self.device))
            lines.append(f"of {size(budget)}, {kept} is reserved for the driver")
        lines += ["", f"{'peak of each phase':28}{'':12}" + ("" if budget is None else "  budget")]
        for phase in self.phases:
            over = self.charged(phase) - usable(budget or 0, self.device)
            verdict = "  fits" if over <= 0 else f"  {size(over)} too much"
            lines.append(row(phase, self.charged(phase)) + ("" if budget is None else verdict))
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What the figures leave out, in a sentence."""
        if self.engine == "vllm":
            return [
                "engine vllm: its copy of the weights and its cache come on top; the rollout is "
                "planned as the own decode loop's"
            ]
        if self.engine == "transformers":
            return [
                "engine transformers: the rollout is planned as the own decode loop's, with its "
                "pages of keys and values"
            ]
        return []


def usable(budget: int, device: str) -> int:
    """What a process can have of ``budget`` bytes: on a GPU all but one part in 16."""
    return budget if device == "cpu" else budget - budget // GPU_RESERVED


def card(needed: int, device: str) -> int:
    """The smallest budget of which ``needed`` bytes are usable."""
    return needed if device == "cpu" else -(-needed * GPU_RESERVED // (GPU_RESERVED - 1))


def row(name: str, count: int) -> str:
    return f"{name:28}{size(count):>12}"


def plan(
    config: PPOConfig,
    *,
    model_config: PreTrainedConfig | None = None,
    device: str = "cpu",
    prompt_length: int = 256,
) -> MemoryPlan:
    """What a run of ``config`` will hold, from its settings alone.

    Args:
        model_config: the model's shape; None: found by `config.model` (see `architecture`).
        device: "cpu" or "cuda".
        prompt_length: tokens of the longest prompt.

    Raises:
        UserError: an unknown model, or settings that it cannot have.
    """
    if model_config is None:
        model_config = architecture(config.model)
    simulated = Simulation(config, model_config, device, prompt_length).run()
    peaks = dict(simulated.peaks)
    if device == "cpu":
        # The file is mapped while its weights are made of it, where they are of another dtype.
        peaks["load"] += simulated.file_bytes
    phases = {phase: peak + LIBRARIES[device] for phase, peak in peaks.items()}
    components = {name: count for name, count in simulated.components.items() if count} | {
        "libraries": LIBRARIES[device]
    }
    return MemoryPlan(config.model, device, prompt_length, components, phases, config.engine)


def planned_and_measured(
    config: PPOConfig,
    model_config: PreTrainedConfig | None,
    peaks: Mapping[str, int],
    *,
    prompt_length: int,
    device: str,
) -> tuple[dict[str, dict[str, float | None]], str]:
    """A run's plan beside what was measured: MiB by phase, and one line that says it.

    Args:
        model_config: None where the run's settings do not say what its model was; then there is no
            plan, as there is none of a model that cannot be planned.
        peaks: measured bytes by phase.
    """
    planned: Mapping[str, int] = {}
    if model_config is not None:
        # The run is over: what it has found is not lost for want of a plan.
        with suppress(UserError):
            planned = plan(
                config, model_config=model_config, device=device, prompt_length=prompt_length
            ).phases
    figures: dict[str, dict[str, float | None]] = {}
    for phase in PHASES:
        both = {"planned": planned.get(phase), "measured": peaks.get(phase)}
        figures[phase] = {k: None if x is None else round(x / MIB, 1) for k, x in both.items()}

    def told(phase: str) -> str:
        of, measured = figures[phase]["planned"], figures[phase]["measured"]
        words = ["?" if x is None else f"{x:.0f}" for x in (of, measured)]
        return f"{phase} {' / '.join(words)}"

    # Of no more prompts than a batch has, the evaluation is not planned: rollout and score are.
    shown = [phase for phase in PHASES if phase != "evaluate" or phase in planned]
    return figures, "memory, planned / measured (MB): " + ", ".join(map(told, shown))


def size(count: int) -> str:
    """Bytes for people to read: ``1.25 GB``, ``340 MB``."""
    if abs(count) >= 1000 * MIB:
        return f"{count / 2**30:.2f} GB"
    return f"{count / MIB:.0f} MB" if abs(count) >= 10 * MIB else f"{count / MIB:.1f} MB"


def parse_size(text: str) -> int:
    """``16GB``, ``7.5 GiB``, ``900MB`` in bytes; units are of 1024.

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])i?B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise UserError(f"{text!r} is not a size; write it like 16GB or 900MB")
    return int(float(found[1]) * (2**30 if found[2] in "gG" else MIB))
