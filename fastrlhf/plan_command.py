"""`fastrlhf plan` and `fastrlhf ppo --auto`: a budget from the command line, a plan to print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from .architectures import architecture
from .config import PPOConfig
from .data import PromptSet, load_rows
from .errors import UserError
from .host_memory import map_large_blocks
from .memory import parse_size, plan, size, usable
from .memory_advice import Fitting, automatic, fit
from .pretrained import context_length, find_pretrained

__all__ = ["Budget", "pick", "show_plan"]

ASSUMED_PROMPT = 256  # tokens of the longest prompt


@dataclass(frozen=True)
class Budget:
    """Where a run is planned for: `--gpu 16GB`, `--memory 8GB`, or neither."""

    gpu: str | None
    memory: str | None

    @property
    def bytes(self) -> int | None:
        if self.gpu and self.memory:
            raise UserError("give --gpu or --memory, not both: a run computes on one of them")
        given = self.gpu or self.memory
        return None if given is None else parse_size(given)

    @property
    def device(self) -> str:
        if self.gpu or self.memory:
            return "cuda" if self.gpu else "cpu"
        return "cuda" if torch.cuda.is_available() else "cpu"


def show_plan(
    config: PPOConfig, budget: Budget, prompt_length: int | None, *, as_json: bool
) -> int:
    """Print the plan, and what to change where it does not fit; 1 if it does not, else 0.

    Args:
        prompt_length: None: `ASSUMED_PROMPT`, and the plan says so.

    Raises:
        UserError: the model cannot have such sequences, or, once the plan is printed, the budget
            is too little whatever is changed.
    """
    limit, model_config = budget.bytes, architecture(config.model)
    length = ASSUMED_PROMPT if prompt_length is None else prompt_length
    context = context_length(model_config)
    if length + config.response_length > context:
        raise UserError(
            f"a prompt has {length} tokens, which with response_length {config.response_length} "
            f"exceeds the model's context of {context}; lower --prompt-length or response_length"
        )
    given: dict[str, Any] = {
        "model_config": model_config, "device": budget.device, "prompt_length": length,
    }  # fmt: skip
    made = plan(config, **given)
    fits = limit is None or made.fits(limit)
    found: Fitting | None = None
    too_little: UserError | None = None
    if limit is not None and not fits:
        try:
            found = fit(config, limit, **given)
        except UserError as error:
            too_little = error
    if as_json:
        changes = None if too_little else [vars(x) for x in found.changes] if found else []
        room = None if limit is None else usable(limit, budget.device)
        after = None if found is None else found.plan.record()
        record = made.record() | {"budget": limit, "usable": room, "fits": fits, "changes": changes}
        print(json.dumps(record | {"after_changes": after}), flush=True)
    else:
        print(made.table(limit, assumed=prompt_length is None), flush=True)
        if found is not None:
            print(f"\nto fit {size(limit or 0)}, the cheapest changes:\n{found.table()}")
            print(f"with them it takes {size(found.plan.needed)}")
    if too_little:
        raise too_little
    return 0 if fits else 1


def pick(config: PPOConfig, budget: Budget) -> tuple[PPOConfig, str]:
    """The configuration that `--auto` runs, and what it picked in words.

    Raises:
        UserError: no budget, one that is too little, or one of a device that will not compute.
    """
    limit = budget.bytes
    if limit is None:
        raise UserError("--auto needs a budget: add --gpu 16GB, or --memory 8GB without a GPU")
    if budget.gpu and not torch.cuda.is_available():
        raise UserError(f"there is no GPU here; give --memory {budget.gpu}")
    if budget.memory and torch.cuda.is_available():
        raise UserError(f"the run would compute on the GPU here; give --gpu {budget.memory}")
    found = find_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    prompts = PromptSet.tokenize(
        load_rows(config.dataset), found.tokenizer, context=context_length(found.config),
        response_length=config.response_length,
    )  # fmt: skip
    fitting = automatic(
        config, limit, model_config=found.config, device=budget.device,
        prompt_length=prompts.longest,
    )  # fmt: skip
    if not budget.gpu:
        map_large_blocks()  # the plan is of what is alive
    words = " ".join(map(str, fitting.changes)) or "the settings as they are"
    needed = size(fitting.plan.needed)
    room = size(usable(limit, budget.device))
    return fitting.config, f"--auto picked {words}: {needed} of {room}"
