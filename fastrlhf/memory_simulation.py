"""The phases of a run, run on the meta device: the very code that trains, without its numbers.

The backbone is built as the trainer builds it, of tensors without data. Each phase then goes
through the engine, `score` and `microbatch_loss` as in training, under a `StorageTracker`. Counted
instead of run:

1. The optimizer's state, by the sizes that its make documents.
2. Of a response's decoding steps, only the last: its cache is full. What the earlier ones leave
   behind (a trunk state a token) is there as they left it.
3. Every prompt is as long as the longest and every response goes to its end.
"""

from __future__ import annotations

import copy


from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .algorithms import ALGORITHMS
from .backbone import LoraSettings, SharedBackbone
from .config import PPOConfig
from .experience import microbatches, score
from .losses import microbatch_loss
from .memory_tracking import StorageTracker, on_device, tensor_bytes
from .rollout.decode import DecodeEngine
from .trunk import positions
from .types import Experience, Prompts, Rollout

__all__ = ["Simulated", "optimizer_bytes", "simulate"]


@dataclass(frozen=True)
class Simulated:
    """Bytes on the device, of tensors alone."""

    components: dict[str, int]
    peaks: dict[str, int]  # by phase, in the order in which they come
    read_bytes: int  # of the weights' file, where loading makes other numbers of it


def optimizer_bytes(parameters: Iterable[nn.Parameter], optim: str) -> int:
    """State of the make ``optim`` for ``parameters``, as `make_optimizer` documents it."""
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        if optim == "adamw_torch" or count < 4096:
            total += 8 * count
        elif optim != "paged_adamw_8bit" or parameter.device.type == "cpu" or count < 100_000:
            # Two moments of a byte, and for each 256 of them a scale.
            total += 2 * (count + 4 * -(-count // 256))
    return total


class Texts:
    """As much of a tokenizer as an engine without data asks for."""

    pad_token_id = eos_token_id = 0

    def decode(self, tokens: Tensor, skip_special_tokens: bool) -> str:
        return ""


class Simulation:
    """A backbone without data and the records that its phases make."""

    def __init__(
        self, config: PPOConfig, model_config: PreTrainedConfig, device: str, prompt_length: int
    ):
        # Making a model writes its dtype into the configuration.
        self.model_config = copy.deepcopy(model_config)
        self.kept = getattr(model_config, "dtype", None) or torch.float32
        self.config, self.device = config, device
        self.prompt, self.length = prompt_length, prompt_length + config.response_length
        self.tracker = StorageTracker(device)
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.components: dict[str, int] = {}
        self.peaks: dict[str, int] = {}

    def run(self) -> Simulated:
        with ExitStack() as stack:
            stack.enter_context(on_device(self.device))
            stack.enter_context(self.tracker)
            self.load()
            rollout = self.phase("rollout", self.rollout, self.config.batch_size)
            experience = self.phase("score", self.score, rollout)
            self.phase("update", self.update, rollout, experience)
        return Simulated(self.components, self.peaks, self.read_bytes)

    def phase(self, name: str, call: Any, *args: Any) -> Any:
        self.tracker.restart()
        result = call(*args)
        self.peaks[name] = self.tracker.peak
        return result

    def load(self) -> None:
        config = self.config
        model = AutoModelForCausalLM.from_config(self.model_config, dtype=self.dtype)
        model.eval()
        base = tensor_bytes(dict(model.named_parameters()), dict(model.named_buffers()))
        outer = tensor_bytes(
            model.get_input_embeddings().weight, model.get_output_embeddings().weight
        )
        self.components["base weights"] = base - outer
        self.components["embedding and head"] = outer
        self.backbone = SharedBackbone(
            model,
            lora=LoraSettings(config.lora_rank, config.lora_alpha),
            train_layers=config.train_layers,
            critic=config.critic,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        own = tensor_bytes(dict(self.backbone.named_parameters()))
        heads = tensor_bytes(dict(self.backbone.value_head.named_parameters()))
        trained = self.backbone.trainable()
        self.components["adapters"] = own - base - heads
        self.components["value head"] = heads
        same = self.kept == self.dtype
        self.read_bytes = 0 if same else base // self.dtype.itemsize * self.kept.itemsize
        self.peaks["load"] = tensor_bytes(dict(self.backbone.named_parameters()))
        self.state = torch.empty(optimizer_bytes(trained, config.optim), dtype=torch.uint8)
        self.components["optimizer state"] = tensor_bytes(self.state)
        self.components["gradients"] = sum(p.numel() * p.element_size() for p in trained)

    def rollout(self, batch: int) -> Rollout:
        """The first and the last step of the engine's loop, and what it returns."""
        config = self.config
        engine = DecodeEngine(self.backbone, Texts(), response_length=config.response_length)
        tokens = torch.empty(batch, self.length, dtype=torch.int64)
        mask = torch.empty(batch, self.length, dtype=torch.bool)
        prompts = Prompts(
            [""] * batch, tokens[:, : self.prompt].clone(), mask[:, : self.prompt].clone(),
            [{}] * batch,
        )  # fmt: skip
        logprobs = torch.empty(batch, config.response_length)
        ended = torch.empty(batch, dtype=torch.bool)
        with (
            torch.no_grad(),
            self.backbone.role("policy") as decoder,
            self.backbone.halves.recorded() as trunk,
        ):
            cache = engine.new_cache(self.length)
            for start, stop in ((0, self.prompt), (self.length - 2, self.length - 1)):
                for layer in cache.layers:
                    layer.filled = start
                hidden = decoder(
                    input_ids=tokens[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions(mask[:, :stop])[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
                self.backbone.head.logits(hidden)
                if start == 0 and trunk:
                    between = self.length - 2 - self.prompt
                    trunk += [torch.empty_like(trunk[0][:, :1]) for _ in range(between)]
        self.components["KV cache"] = sum(
            tensor_bytes(x.key_buffer, x.value_buffer) for x in cache.layers
        )
        return engine.finish(prompts, tokens, mask, logprobs, ended, trunk)

    def score(self, rollout: Rollout) -> Experience:
        parts = self.parts(torch.arange(self.config.batch_size, device="cpu"))
        experience = score(self.backbone, rollout, parts, self.config)
        self.components["trunk cache"] = tensor_bytes(experience.trunk)
        columns = [x for x in vars(experience).values() if x is not None]
        self.components["experience"] = tensor_bytes(columns) - tensor_bytes(experience.trunk)
        return experience

    def parts(self, rows: Tensor) -> list[Tensor]:
        return microbatches(rows, self.length, self.config.microbatch_tokens)

    def update(self, rollout: Rollout, experience: Experience) -> None:
        config = self.config
        spec = ALGORITHMS["ppo"].spec(config, 1.0)
        rows = torch.arange(config.batch_size // config.num_mini_batches, device="cpu")
        before = self.tracker.live
        # With the second, the first one's gradients are there.
        for part in self.parts(rows)[:2]:
            loss = microbatch_loss(self.backbone, experience.select(part), spec, config, 1)
            loss.loss.backward()
            del loss
        for parameter in self.backbone.trainable():
            parameter.grad = None
        activations = self.tracker.peak - before - self.components["gradients"]
        self.components["activations of a microbatch"] = max(0, activations)


def simulate(
    config: PPOConfig, model_config: PreTrainedConfig, device: str, prompt_length: int
) -> Simulated:
    """Components and peaks of a run of ``config``, on the device and without what it adds."""
    return Simulation(config, model_config, device, prompt_length).run()
