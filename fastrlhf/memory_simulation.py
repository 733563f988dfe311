"""The phases of a run, run on the meta device: the very code that trains, without its numbers.

The backbone is loaded as the trainer loads it, of tensors without data. Each phase then goes
through the engine, `score` and the update as in training, under a `StorageTracker`. Counted instead
of run:

1. The optimizer's state, by the sizes that its make documents; no make holds temporaries.
2. Of a response's decoding steps, only the last: its caches are full, and all slots in use.
3. Of a rollout's and a minibatch's microbatches, the first two. They are the longest, and what
   one leaves behind is there in the second.
4. Every prompt is as long as the longest and every response goes to its end.
5. Whichever engine samples, the own decode loop does here, with transformers' pages of keys and
   values. What another engine holds beside them is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastrlhf_kernels import _backend, _cpu, reference, sample

from .algorithms import ALGORITHMS
from .config import PPOConfig
from .controllers import AlgorithmState
from .errors import UserError
from .experience import minibatch_losses, score
from .loading import load_backbone
from .memory_shapes import ShapeOnly
from .memory_tracking import StorageTracker, running_as, tensor_bytes
from .microbatches import Layout, Sequences, cut
from .rollout.draft import Draft
from .rollout.engines import cache_length, own_engine
from .rollout.steps import FamilySteps
from .rollout.whole import forward, new_cache
from .step import Updater
from .trunk_cache import TrunkCache
from .types import Experience, Prompts, Rollout

__all__ = ["Simulated", "Simulation", "optimizer_bytes"]

ENOUGH = 2  # microbatches


@dataclass(frozen=True)
class Simulated:
    """Bytes on the device, of tensors alone."""

    components: dict[str, int]
    peaks: dict[str, int]  # by phase, in the order in which they come
    file_bytes: int  # of the weights' file, where loading makes other numbers of it


def optimizer_bytes(parameters: Iterable[nn.Parameter], optim: str, device: str) -> int:
    """State on the device of the make ``optim``, as `make_optimizer` documents it."""
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        if optim == "adamw_torch" or count < 4096:
            total += 8 * count
        # Pages of 100,000 numbers and more lie in host memory.
        elif optim != "paged_adamw_8bit" or device == "cpu" or count < 100_000:
            # Two moments of a byte, and for each 256 of them a scale.
            total += 2 * (count + 4 * -(-count // 256))
    return total


class Texts:
    """As much of a tokenizer as an engine without data asks for."""

    pad_token_id = eos_token_id = 0

    def decode(self, tokens: Tensor, skip_special_tokens: bool) -> str:
        return ""


class NoSteps(torch.optim.Optimizer):
    """Stands in for kernels that read and write their state in place."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class NoSchedule:
    def step(self) -> None:
        pass


class Simulation:
    """A backbone without data and the records that its phases make.

    Args:
        prompt_length: tokens of the longest prompt.
        kind: the device that is planned for, "cpu" or "cuda".
        device: where the tensors are. Any but "meta" runs the same steps on real ones.
    """

    def __init__(
        self,
        config: PPOConfig,
        model_config: PreTrainedConfig,
        kind: str,
        prompt_length: int,
        *,
        device: str = "meta",
    ):
        self.config, self.kind, self.device = config, kind, device
        self.prompt, self.length = prompt_length, prompt_length + config.response_length
        # A GPU that is not here is taken for one that Triton knows.
        if kind == "cpu":
            self.samples_in_kernels = _cpu.available()
        else:
            here = torch.cuda.is_available()
            self.samples_in_kernels = not here or _backend._device_backend(kind, None) == "triton"
        self.tracker = StorageTracker(kind)
        self.source = ShapeOnly(model_config, self.tracker)
        self.components: dict[str, int] = {}
        self.peaks: dict[str, int] = {}

    def run(self) -> Simulated:
        """Go through the phases.

        Raises:
            UserError: settings that the model cannot have, or a model whose own code fails on
                tensors without data.
        """
        try:
            return self.phases()
        except UserError:
            raise
        except Exception as error:  # a model's code is another's, and may raise anything
            if self.device != "meta":
                raise
            reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
            raise UserError(
                "this model cannot be planned: its code fails on tensors without data "
                f"({reason}); train it without --auto"
            ) from error

    def phases(self) -> Simulated:
        config = self.config
        with ExitStack() as stack:
            if self.device == "meta":
                stack.enter_context(running_as(self.kind))
            stack.enter_context(self.tracker)
            with torch.device(self.device):
                self.load()
            if config.eval_prompts > config.batch_size:
                self.phase("evaluate", self.evaluate)
            given = (config.batch_size, config.num_generations)
            rollout = self.phase("rollout", self.rollout, *given)
            # Sequences at the left edge need no mask, and torch finds that out.
            self.tracker.answer = config.microbatching == "sorted"
            experience = self.phase("score", self.score, rollout)
            self.phase("update", self.update, experience)
        file_bytes = self.source.file_bytes(self.backbone.head.weight.dtype, config.quantization)
        return Simulated(self.components, self.peaks, file_bytes)

    def phase(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        self.tracker.restart()
        result = call(*args)
        self.peaks[name] = self.tracker.peak
        return result

    def load(self) -> None:
        self.backbone = load_backbone(self.source, self.config, self.device)
        trained = self.backbone.trainable()
        named = dict(self.backbone.named_parameters())
        adapters = tensor_bytes([p for name, p in named.items() if "lora_" in name])
        heads = tensor_bytes([p for name, p in named.items() if "value_head" in name])
        rest = self.tracker.live - self.source.base - adapters - heads
        self.components |= {
            "base weights": self.source.base - self.source.outer,
            "embedding and head": self.source.outer,
            "reference copy": rest,
            "adapters": adapters,
            "value head": heads,
        }
        self.peaks["load"] = self.tracker.live
        self.optimizer = NoSteps(trained)
        state = optimizer_bytes(trained, self.config.optim, self.kind)
        # From the second rollout on it is there in every phase.
        self.state = torch.empty(state, dtype=torch.uint8)
        self.components["optimizer state"] = state
        gradients = [p.numel() * p.element_size() for p in trained]
        in_backward = self.config.optimizer_in_backward
        self.components["gradients"] = max(gradients) if in_backward else sum(gradients)

    def rollout(self, batch: int, generations: int = 1) -> Rollout:
        """The prompts' forward and the last step of the engine's loop, and what it returns."""
        config = self.config
        engine = own_engine(self.backbone, Texts(), config)
        with torch.device(self.device):
            tokens = torch.zeros(batch, self.length, dtype=torch.int64)
            mask = torch.ones(batch, self.length, dtype=torch.bool)
            mask[0, 0] = False
            logprobs, uniform = (torch.zeros(batch, config.response_length) for _ in range(2))
            ended = torch.zeros(batch, dtype=torch.bool)
        given = tokens[:, : self.prompt].clone(), mask[:, : self.prompt].clone()
        prompts = Prompts([""] * batch, *given, [{}] * batch)
        draft = Draft(prompts, tokens, mask, logprobs, ended, uniform)
        with torch.no_grad(), self.backbone.role("policy") as decoder:
            family = engine.family(decoder)
            slots = min(config.rollout_slots or batch, batch)
            if family is None:
                buffers = self.decode_whole(decoder, tokens[:slots], mask[:slots])
            else:
                cache = engine.new_cache(batch, cache_length(config, self.length))
                steps = engine.steps(decoder, family, cache)
                self.decode(steps, draft, slots, -(-slots // generations))
                buffers = cache.numbers()
        self.components["KV cache"] = tensor_bytes(buffers)
        kept = draft.trunk
        self.components["trunk cache"] = 0 if kept is None else tensor_bytes(kept.device_rows)
        rollout = draft.finish(Texts())
        # The cuts are worked out in host memory, of masks whose values are known.
        masks = (torch.ones(batch, self.length), torch.ones(batch, config.response_length))
        masks[0][0, 0] = 0.0
        vars(rollout)["sequences"] = Sequences(*(mask.bool() for mask in masks))
        return rollout

    def decode(self, steps: FamilySteps, draft: Draft, slots: int, prompts: int) -> None:
        """As `SlotLoop` does with all slots in use; ``prompts``: different ones among them."""
        with torch.device(self.device):
            rows, lengths = torch.arange(slots), torch.full((prompts,), self.prompt)
            sources = rows % prompts
            columns = torch.full((slots,), self.length - 2)
        first = steps.prompts(draft.tokens[:prompts, : self.prompt], lengths, rows, sources)
        for states, width in ((first, self.prompt), (None, 1)):
            if states is None:
                states = steps.tokens(draft.tokens[:slots, -1], columns, self.length - 1)
            if states.trunk is not None:
                self.keep(draft, states.trunk, width)
            hidden = states.last if width == 1 else states.last[sources]
            del states
            self.draw(self.backbone.head.logits(hidden))

    def keep(self, draft: Draft, states: Tensor, width: int) -> None:
        if draft.trunk is None:
            shape = *draft.tokens.shape, states.shape[-1]
            with torch.device(self.device):
                draft.trunk = TrunkCache(
                    *shape, dtype=states.dtype, device=states.device,
                    budget_mb=self.config.trunk_cache_mb,
                )  # fmt: skip
            if self.kind != "cpu":
                self.tracker.forget(draft.trunk.host_rows)
        # A prompt's states are written for one sequence after the other.
        columns = torch.arange(width, device="cpu")
        draft.trunk.write_tokens(columns, states[0])

    def decode_whole(self, decoder: Any, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """As `decode_whole` does; the buffers of keys and values."""
        cache: Any = new_cache(decoder, cache_length(self.config, self.length))
        for start, stop in ((0, self.prompt), (self.length - 2, self.length - 1)):
            for layer in cache.layers:
                if start:
                    layer.filled = start
                    layer.keys = layer.key_buffer[:, :, :start]
            hidden = forward(decoder, cache, tokens[:, start:stop], mask[:, :stop])
            self.draw(self.backbone.head.logits(hidden))
        return [x for layer in cache.layers for x in (layer.key_buffer, layer.value_buffer)]

    def draw(self, logits: Tensor) -> None:
        """Sample: our kernels read the logits where they lie, the reference makes copies."""
        if self.device != "meta":
            # What the cache holds between the two steps is no numbers, nor are these logits.
            sample(logits.zero_(), temperature=self.config.temperature)
        elif not self.samples_in_kernels:
            row = logits.new_empty(logits.shape[0])
            reference.sample(logits, row, row, 0, 1.0)

    def cut(self, sequences: Sequences, count: int) -> list[Layout]:
        given = (self.config.microbatching, self.config.microbatch_tokens)
        return cut(sequences, torch.arange(count), *given)[:ENOUGH]

    def score(self, rollout: Rollout) -> Experience:
        layouts = self.cut(rollout.sequences, len(rollout.tokens))
        experience = score(self.backbone, rollout, layouts, self.config)
        columns = [x for x in vars(experience).values() if isinstance(x, Tensor)]
        self.components["experience"] = tensor_bytes(columns)
        return experience

    def evaluate(self) -> None:
        rollout = self.rollout(self.config.eval_prompts)
        self.tracker.answer = self.config.microbatching == "sorted"
        self.score(rollout)
        self.tracker.answer = False

    def update(self, experience: Experience) -> None:
        """One step of the optimizer."""
        config = self.config
        spec = ALGORITHMS[config.algorithm].spec(config, 1.0, AlgorithmState.of(config))
        layouts = self.cut(experience.sequences, config.batch_size // config.num_mini_batches)

        schedule: Any = NoSchedule()
        before = self.tracker.live
        updater = Updater(self.optimizer, schedule, config)
        items = (config.batch_size, config.batch_size)
        updater.update(minibatch_losses(self.backbone, experience, layouts, spec, config, *items))
        held = self.tracker.peak - before - self.components["gradients"]
        self.components["activations of a microbatch"] = max(0, held)
