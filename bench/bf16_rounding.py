"""Steps of 1e-6 on bfloat16 weights: lost when rounded to the nearest, kept when stochastically.

A small language model over bytes learns Python sources in float32 and is rounded to bfloat16. From
there all of its weights are trained on this project's own prose at a learning rate of 1e-6, three
times with the same batches and the same AdamW8bit: in float32, in bfloat16 rounded to the nearest,
and in bfloat16 rounded stochastically. Losses are of the same batches of prose, computed in float32
from the weights as they are.

    python bench/bf16_rounding.py            rewrites bench/results/bf16_rounding.jsonl
    python bench/bf16_rounding.py --print    only prints the rows
"""

import copy
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from results import ROOT, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastrlhf import PPOConfig
from fastrlhf.optim import make_optimizer

SHAPE = dict(
    vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    tie_word_embeddings=True,
)  # fmt: skip
BATCH, LENGTH = 8, 64
LEARNING_RATE = 1e-6
# What the weights are kept in, and whether they are rounded stochastically.
VARIANTS = {
    "float32": (torch.float32, False),
    "bfloat16, to the nearest": (torch.bfloat16, False),
    "bfloat16, stochastic": (torch.bfloat16, True),
}


def sources() -> Tensor:
    modules = (inspect, json, copy, os, torch.nn.functional)
    return as_bytes([Path(module.__file__ or "") for module in modules])


def prose() -> Tensor:
    return as_bytes([ROOT / "docs/math.md", ROOT / "CONTRIBUTING.md", ROOT / "bench/NOTES.md"])


def as_bytes(paths: list[Path]) -> Tensor:
    text = b"".join(path.read_bytes() for path in paths)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batches(text: Tensor, count: int, seed: int) -> list[Tensor]:
    """[BATCH, LENGTH] bytes each."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (count, BATCH), generator=generator)
    return list(text[starts[..., None] + torch.arange(LENGTH)])


def train(
    model: LlamaForCausalLM, data: list[Tensor], config: PPOConfig, *, stochastic: bool = True
) -> None:
    optimizer = make_optimizer(model.parameters(), config)
    for group in optimizer.param_groups:
        group["stochastic_rounding"] = stochastic
    for tokens in data:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: LlamaForCausalLM, data: list[Tensor]) -> float:
    """Nats a byte."""
    whole = copy.deepcopy(model).float()
    return sum(float(whole(input_ids=x, labels=x).loss) for x in data) / len(data)


def numbers(model: LlamaForCausalLM) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def compare(
    seed: int, *, pretraining: int = 150, steps: int = 200, shape: dict[str, Any] = SHAPE
) -> list[dict[str, Any]]:
    """A row for each of VARIANTS."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    train(model, batches(sources(), pretraining, seed), PPOConfig(learning_rate=3e-3, seed=seed))
    start = model.to(torch.bfloat16)
    data, judged = batches(prose(), steps, seed), batches(prose(), 32, seed + 1000)
    before = loss(start, judged)
    rows: list[dict[str, Any]] = []
    for name, (dtype, stochastic) in VARIANTS.items():
        trained = copy.deepcopy(start).to(dtype)
        config = PPOConfig(learning_rate=LEARNING_RATE, seed=seed)
        train(trained, data, config, stochastic=stochastic)
        rows.append(
            {
                "bench": "bf16_rounding",
                "seed": seed,
                "weights": name,
                "parameters": len(numbers(start)),
                "steps": steps,
                "learning_rate": LEARNING_RATE,
                "moved": round(float((numbers(trained) != numbers(start)).float().mean()), 4),
                "loss_before": before,
                "decrease": before - loss(trained, judged),
            }
        )
        rows[-1]["decrease_to_float32"] = round(rows[-1]["decrease"] / rows[0]["decrease"], 3)
    return rows


if __name__ == "__main__":
    measured = [row for seed in (1, 2, 3) for row in compare(seed)]
    for row in measured:
        print(json.dumps(row))
    if "--print" not in sys.argv:
        write("bf16_rounding", measured)
