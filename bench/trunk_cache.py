"""What the trunk cache saves: the score and update phases of a PPO step on SmolLM2-135M.

The demo's recipe (4 epochs, LoRA of rank 16) with adapters in the top quarter of the layers, whose
states sampling kept; the same with the cache off, so that each forward of a microbatch starts from
the tokens; and adapters in all layers, where there is nothing to keep. One rollout for all, steps
in turns in one process, medians. Real weights where they are installed; time does not depend on
their values.

    python bench/trunk_cache.py                rewrites bench/results/trunk_cache.jsonl
    python bench/trunk_cache.py --print        only prints the rows
    python bench/trunk_cache.py --rounds 1     rounds, instead of 4, after one to warm up
    python bench/trunk_cache.py --sequences 4  a smaller batch than 32, to try it out
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from results import write
from transformers import LlamaForCausalLM
from update_memory import SMOLLM2_135M, Tokenizer, make_rollout

from fastrlhf import PPOTrainer, UserError, load_config
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.experience import score
from fastrlhf.pretrained import find_pretrained
from fastrlhf.types import Rollout

TOP = SMOLLM2_135M["num_hidden_layers"] // 4
PROMPTS = [{"prompt": f"{opening} number {i}"} for i in range(8) for opening in (
    "This film", "I went to see", "The first half of the story", "My wife and I", "Honestly",
    "For a remake", "What a strange and beautiful movie", "The actors", "Nobody in it",
)]  # fmt: skip


def base() -> tuple[LlamaForCausalLM, Any]:
    """The model and its tokenizer; weights at random, and no tokenizer, where it is not there."""
    try:
        found = find_pretrained("smollm2-135m")
    except UserError:
        torch.manual_seed(0)
        from transformers import LlamaConfig

        return LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval(), None
    return found.load(dtype=torch.float32, device="cpu"), found.tokenizer


def make_trainer(train_layers: Any, cached: bool, sequences: int, folder: str) -> PPOTrainer:
    config = replace(
        load_config("sentiment"), train_layers=train_layers, trunk_cache=cached, eval_prompts=8,
        batch_size=sequences, total_episodes=sequences,
        # The policy stays where it is: every step does the same work.
        learning_rate=1e-12, lr_scheduler_type="constant", output_dir=folder,
    )  # fmt: skip
    model, tokenizer = base()
    backbone = SharedBackbone(
        model,
        lora=LoraSettings(config.lora_rank, config.lora_alpha),
        train_layers=train_layers,
        critic=config.critic,
    )
    return PPOTrainer(
        backbone, lambda completions, **_: [float(i % 5) for i in range(len(completions))], config,
        PROMPTS, processing_class=Tokenizer() if tokenizer is None else tokenizer,
    )  # fmt: skip


def sampled(trainer: PPOTrainer) -> Rollout:
    if isinstance(trainer.engine.tokenizer, Tokenizer):
        # Nothing to sample with: random tokens, whose states scoring keeps.
        sequences = trainer.config.batch_size
        rollout = make_rollout(SMOLLM2_135M["vocab_size"], sequences)
        layouts = trainer.cut(rollout.sequences, [torch.arange(sequences)], 320)
        found = score(trainer.backbone, rollout, layouts, trainer.config)
        return replace(rollout, trunk=found.trunk, rollout_logprobs=found.old_logprobs)
    return trainer.engine.generate(
        next(trainer.batches()).batch(trainer.backbone.device), trainer.generator
    )


def step(trainer: PPOTrainer, rollout: Rollout) -> dict[str, float]:
    """Seconds of a step's phases, its rollout given."""
    trainer.engine.generate = lambda *_: rollout  # type: ignore[method-assign]
    line = trainer.step(2, trainer.train_prompts)
    return {phase: line[f"time/{phase}"] for phase in ("score", "update")}


def measure(rounds: int, sequences: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "cache on": make_trainer(TOP, True, sequences, f"{folder}/on"),
            "cache off": make_trainer(TOP, False, sequences, f"{folder}/off"),
            "LoRA on all layers": make_trainer("all", False, sequences, f"{folder}/all"),
        }
        config = variants["cache on"].config
        rollout = sampled(variants["cache on"])
        bare = replace(rollout, trunk=None)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for number in range(rounds + 1):
            for name, trainer in variants.items():
                seconds = step(trainer, rollout if name == "cache on" else bare)
                if number:
                    times[name].append(seconds)
    medians = {
        name: {x: statistics.median(t[x] for t in taken) for x in ("score", "update")}
        for name, taken in times.items()
    }
    both = {n: statistics.median(t["score"] + t["update"] for t in x) for n, x in times.items()}
    return [
        {
            "bench": "trunk_cache",
            "model": "SmolLM2-135M, float32",
            "variant": name,
            "train_layers": variants[name].config.train_layers,
            "epochs": config.num_ppo_epochs,
            "sequences": config.batch_size,
            "tokens": int(rollout.attention_mask.sum()),
            "rounds": rounds,
            "score_seconds": round(medians[name]["score"], 3),
            "update_seconds": round(medians[name]["update"], 3),
            "seconds": round(both[name], 3),
            "times_cache_on": round(both[name] / both["cache on"], 3),
        }
        for name in variants
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--print", action="store_true", dest="only_print")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=32)
    given = parser.parse_args()
    rows = measure(given.rounds, given.sequences)
    for row in rows:
        print(json.dumps(row))
    if not given.only_print:
        write("trunk_cache", rows)
