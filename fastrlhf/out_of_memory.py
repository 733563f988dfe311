"""When memory runs out anyway: smaller microbatches, and the step once more.

The sums of a step do not depend on its microbatches, so a step that has changed no weight yet is
dropped and taken again with half the tokens a microbatch; the run keeps to that. What cannot be
made smaller, or taken again, ends the run with the setting to change; sampling is such a thing.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from .config import PPOConfig
from .errors import UserError
from .microbatches import Layout

__all__ = ["MicrobatchBudget", "is_out_of_memory", "sampled"]

T = TypeVar("T")

# What torch's allocator for CPUs says, on Linux and elsewhere.
CPU_MESSAGES = ("can't allocate memory", "DefaultCPUAllocator", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_MESSAGES)


class MicrobatchBudget:
    """How many tokens a microbatch may have now.

    Args:
        config: starts at its microbatch_tokens.
        say: told the first time that memory runs out.
    """

    def __init__(self, config: PPOConfig, say: Callable[[str], None] = lambda text: None):
        self.config = config
        self.say = say
        self.tokens = config.microbatch_tokens
        self.retries = 0

    def metrics(self) -> dict[str, int]:
        """The budget as it is, and how often it was halved in this run."""
        return {"memory/microbatch_tokens": self.tokens, "memory/retries": self.retries}

    def state_dict(self) -> dict[str, int]:
        begun = self.config.microbatch_tokens
        return {"tokens": self.tokens, "retries": self.retries, "begun_with": begun}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with what was halved; a setting that was changed since begins anew."""
        self.retries = state["retries"]
        if state["begun_with"] == self.config.microbatch_tokens:
            self.tokens = state["tokens"]

    def run(
        self,
        cut: Callable[[int], list[Layout]],
        attempt: Callable[[list[Layout]], T],
        can_repeat: Callable[[], bool] = lambda: True,
    ) -> T:
        """`attempt(cut(tokens))`, with half the tokens each time that memory runs out.

        Args:
            cut: the microbatches for a budget of tokens.
            attempt: leaves nothing behind when it raises.
            can_repeat: asked after it raised: whether that is so.

        Raises:
            UserError: it cannot be repeated, or every microbatch is a single sequence already.
        """
        while True:
            layouts = cut(self.tokens)
            try:
                return attempt(layouts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                forget(error)
            # Out here the error is gone, and with it the frames that held tensors.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not can_repeat():
                raise UserError(self.half_taken())
            self.halve(layouts)

    def halve(self, layouts: list[Layout]) -> None:
        """At most half the tokens of what was tried, for the rest of the run."""
        splittable = [x.num_tokens for x in layouts if x.num_sequences > 1]
        if not splittable:
            raise UserError(self.too_long(max(x.num_tokens for x in layouts)))
        before = self.tokens
        # A budget above what there was to fill it would have to be halved more than once.
        self.tokens = max(1, min(before, max(splittable)) // 2)
        self.retries += 1
        if self.retries == 1:
            self.say(
                f"memory ran out: microbatch_tokens is {self.tokens} instead of {before} from here "
                "on, and is halved again where that does not help (memory/ in the metrics)"
            )

    def too_long(self, tokens: int) -> str:
        config = self.config
        changes = []
        if not config.gradient_checkpointing:
            changes.append("set gradient_checkpointing to true")
        if config.train_layers != 1:
            changes.append("lower train_layers")
        if config.quantization is None and config.use_peft:
            changes.append("set quantization to nf4")
        changes.append(f"lower response_length (now {config.response_length})")
        return (
            f"memory ran out with a single sequence of {tokens} tokens in a microbatch; "
            + ", or ".join(changes)
        )

    def half_taken(self) -> str:
        if self.config.optimizer_in_backward:
            return (
                "memory ran out, and a step of optimizer_in_backward cannot be taken again; lower "
                "microbatch_tokens and raise num_mini_batches, or set optimizer_in_backward to "
                "false"
            )
        return (
            "memory ran out while the optimizer stepped, which cannot be taken again; lower "
            "train_layers or set optim to paged_adamw_8bit"
        )


def sampled(generate: Callable[[], T], count: int, change: str) -> T:
    """`generate()`, which samples ``count`` responses.

    Raises:
        UserError: memory ran out; ``change`` says what makes the responses fewer.
    """
    try:
        return generate()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        forget(error)
    # What follows, such as saving the weights, has the memory that the attempt held.
    gc.collect()
    raise UserError(
        f"memory ran out while sampling {count} responses; {change} or lower response_length"
    )


def forget(error: BaseException | None) -> None:
    """Clear the frames that ``error`` and what led to it went through: they hold tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
