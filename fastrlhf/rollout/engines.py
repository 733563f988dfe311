"""Where rollouts come from: one interface, whoever samples.

Another engine computes log-probabilities with other kernels, or in another precision, than the
policy that trains. The gap is reported in every run, and truncated importance weights
(importance.py) correct for it. What scoring recomputes is the old policy, whoever sampled.

`transformers` is its continuous batching (`generate_batch`), on this very model, adapters on.
`vllm` is an optional package with a copy of the weights of its own; it gets the adapter at every
rollout, through a folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ..backbone import SharedBackbone
from ..config import PPOConfig
from ..errors import UserError
from ..types import Prompts, Rollout
from .decode import DecodeEngine
from .draft import Draft

__all__ = [
    "Engine",
    "TransformersEngine",
    "VllmEngine",
    "cache_length",
    "make_engine",
    "own_engine",
]

MOST_TOKENS = 8192
"""tokens of a forward of transformers' engine, which is its own default"""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""what vLLM takes for the largest rank of its adapters"""


class Engine(Protocol):
    """What samples."""

    backbone: SharedBackbone

    def generate(self, prompts: Prompts, generator: torch.Generator) -> Rollout:
        """One response for every prompt, drawn with ``generator``."""


def make_engine(backbone: SharedBackbone, tokenizer: Any, config: PPOConfig) -> Any:
    """The engine that ``config`` asks for.

    Raises:
        UserError: vLLM is not installed, or cannot sample from this backbone.
    """
    if config.engine == "transformers":
        return TransformersEngine(backbone, tokenizer, config)
    if config.engine == "vllm":
        return VllmEngine(backbone, tokenizer, config)
    return own_engine(backbone, tokenizer, config)


def own_engine(backbone: SharedBackbone, tokenizer: Any, config: PPOConfig) -> DecodeEngine:
    """The own decode loop, whichever engine ``config`` asks for; others keep no trunk."""
    return DecodeEngine(
        backbone,
        tokenizer,
        response_length=config.response_length,
        temperature=config.temperature,
        stops=config.stop_token == "eos",
        trunk_cache=config.trunk_cache and config.engine == "fastrlhf",
        trunk_cache_mb=config.trunk_cache_mb,
        slots=config.rollout_slots,
        cuda_graphs=config.cuda_graphs,
    )


def cache_length(config: PPOConfig, length: int) -> int:
    """Tokens of keys and values kept for one of ``length``: transformers has pages of them."""
    page = ContinuousBatchingConfig.page_size if config.engine == "transformers" else 1
    return -(-length // page) * page


class OtherEngine:
    """What engines that are not ours have in common: prompts without padding in, a Rollout out."""

    def __init__(self, backbone: SharedBackbone, tokenizer: Any, config: PPOConfig):
        self.backbone, self.tokenizer, self.config = backbone, tokenizer, config
        self.stop = tokenizer.eos_token_id if config.stop_token == "eos" else None

    def generate(self, prompts: Prompts, generator: torch.Generator) -> Rollout:
        """One response for every prompt, drawn with a seed that ``generator`` gives."""
        draft = Draft.of(
            prompts, self.config.response_length, self.tokenizer.pad_token_id, generator
        )
        # The numbers that our own loop would draw with are the seed here.
        seed = int(draft.uniform[0, 0] * 2**24)
        tokens = prompts.tokens
        texts = [row[m].tolist() for row, m in zip(tokens, prompts.attention_mask, strict=True)]
        for row, (ids, logprobs) in enumerate(self.sample(texts, seed)):
            steps = torch.arange(len(ids), device=tokens.device)
            values: list[Tensor] = [torch.tensor(x, device=tokens.device) for x in (ids, logprobs)]
            draft.add(torch.full_like(steps, row), steps, values[0], values[1].float())
            draft.ended[row] = self.stop is not None and ids[-1] == self.stop
        return draft.finish(self.tokenizer)

    def sample(
        self, prompts: Sequence[list[int]], seed: int
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens of each response, its stop token included, and their log-probabilities."""
        raise NotImplementedError


class TransformersEngine(OtherEngine):
    """transformers' continuous batching."""

    def sample(
        self, prompts: Sequence[list[int]], seed: int
    ) -> list[tuple[list[int], list[float]]]:
        model: Any = self.backbone.model
        settings = GenerationConfig(
            max_new_tokens=self.config.response_length, do_sample=True, top_k=0, top_p=1.0,
            temperature=self.config.temperature, pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=-1 if self.stop is None else self.stop,
        )  # fmt: skip
        options = ContinuousBatchingConfig(
            return_logprobs=True, seed=seed, **self.room([len(ids) for ids in prompts])
        )
        devices = [self.backbone.device] if self.backbone.device.type == "cuda" else []
        # It seeds torch's own generator, which belongs to whoever runs the trainer.
        with self.backbone.role("policy"), torch.random.fork_rng(devices):
            # In the order of the prompts, whichever ends first.
            found = model.generate_batch(
                list(prompts), settings, options, progress_bar=False, warmup=False
            )
        if len(found) != len(prompts) or any(output.error for output in found.values()):
            raise UserError(
                "transformers' generate_batch lost sequences of this rollout; set engine: fastrlhf"
            )
        return [(output.generated_tokens, output.logprobs) for output in found.values()]

    def room(self, lengths: list[int]) -> dict[str, Any]:
        """Keys and values of this rollout, and no more; ``lengths`` of the prompts.

        Left to itself it takes more than half of the free memory, and on a CPU fills it with zeros.
        """
        config, page = self.config, ContinuousBatchingConfig.page_size
        kept = sum(cache_length(config, n + config.response_length) for n in lengths)
        return {"num_blocks": kept // page, "max_batch_tokens": min(MOST_TOKENS, sum(lengths))}


class VllmEngine(OtherEngine):
    """vLLM, with a copy of the base weights of its own, from where the backbone's came.

    Raises:
        UserError: vLLM is missing, the policy is not an adapter on the base weights, or those came
            from no folder and no hub.
    """

    def __init__(self, backbone: SharedBackbone, tokenizer: Any, config: PPOConfig):
        super().__init__(backbone, tokenizer, config)
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError:
            raise UserError("engine vllm needs vLLM; run: pip install 'fastrlhf[vllm]'") from None
        if backbone.lora is None:
            raise UserError("engine vllm samples from adapters only; set use_peft: true")
        source = backbone.model.config.name_or_path
        if not source:
            raise UserError(
                "engine vllm loads the base weights itself, and this model came from no folder or "
                "hub; give one as model, or set engine to fastrlhf"
            )
        self.vllm = vllm
        self.model = vllm.LLM(
            model=source, trust_remote_code=config.trust_remote_code,
            dtype=str(backbone.head.weight.dtype).removeprefix("torch."), seed=config.seed,
            enable_lora=True, max_lora_rank=self.largest_rank(),
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            max_model_len=config.vllm_max_model_length,
            # Of the distribution that was drawn from, its temperature included.
            logprobs_mode="processed_logprobs",
        )  # fmt: skip
        self.rollouts = 0

    def largest_rank(self) -> int:
        """The least rank that vLLM takes, and the policy's adapter fits in."""
        ranks = [self.backbone.adapters.rank(name) for name in self.backbone.roles["policy"]]
        return next((rank for rank in VLLM_RANKS if rank >= max(ranks)), max(ranks))

    def sample(
        self, prompts: Sequence[list[int]], seed: int
    ) -> list[tuple[list[int], list[float]]]:
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        self.rollouts += 1
        # Each request draws by a generator of its own: with one seed for all, the completions of a
        # prompt would be the same.
        settings = [
            self.vllm.SamplingParams(
                max_tokens=self.config.response_length, temperature=self.config.temperature,
                top_p=1.0, top_k=-1, logprobs=0, seed=seed + number, detokenize=False,
                stop_token_ids=[] if self.stop is None else [self.stop],
                ignore_eos=self.stop is None,
            )
            for number in range(len(prompts))
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            self.backbone.adapters.save(Path(folder), self.backbone.roles["policy"])
            # vLLM keeps adapters by number: a new one is read anew.
            adapter = LoRARequest("policy", self.rollouts, folder)
            given = [{"prompt_token_ids": ids} for ids in prompts]
            found = self.model.generate(given, settings, lora_request=adapter, use_tqdm=False)
        answers = [output.outputs[0] for output in found]
        return [
            (
                list(answer.token_ids),
                [
                    step[i].logprob
                    for i, step in zip(answer.token_ids, answer.logprobs, strict=True)
                ],
            )
            for answer in answers
        ]
