"""Peak extra memory of one PPO update over 2048 tokens at SmolLM2-135M's shape.

Extra: beyond weights, optimizer state and the trunk cache, which are all there before the update
starts. Measured as the process's resident high-water mark (VmHWM, reset before) less what was
resident. Weights are random: memory does not depend on their values. Linux only.

    python bench/update_memory.py            rewrites bench/results/update_memory.jsonl
    python bench/update_memory.py --print    only prints the row
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from peak import extra_mb
from results import write
from transformers import LlamaConfig, LlamaForCausalLM

from fastrlhf import PPOConfig, PPOTrainer, load_config
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.experience import score
from fastrlhf.types import Prompts, Rollout
from fastrlhf_kernels import linear_policy_loss

SMOLLM2_135M = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
    tie_word_embeddings=True,
)  # fmt: skip
SEQUENCES, PROMPT, RESPONSE = 64, 8, 24


def make_rollout(vocab: int, sequences: int = SEQUENCES, response: int = RESPONSE) -> Rollout:
    tokens = torch.randint(3, vocab, (sequences, PROMPT + response))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    prompts = Prompts(["p"] * sequences, tokens[:, :PROMPT], mask[:, :PROMPT], [{}] * sequences)
    return Rollout(
        prompts, ["c"] * sequences, tokens, mask, mask[:, PROMPT:],
        torch.zeros(sequences, response), torch.zeros(sequences, dtype=torch.bool),
    )  # fmt: skip


class Tokenizer:
    """As much of a tokenizer as a trainer that does not generate asks for."""

    pad_token_id = eos_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3]}


def make_trainer(config: PPOConfig) -> PPOTrainer:
    torch.manual_seed(0)
    backbone = SharedBackbone(
        LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval(),
        lora=LoraSettings(config.lora_rank, config.lora_alpha),
        train_layers=config.train_layers,
        critic=config.critic,
    )
    rows = [{"prompt": str(i)} for i in range(8)]
    return PPOTrainer(
        backbone, lambda completions, **_: [0.0] * len(completions), config, rows,
        processing_class=Tokenizer(),
    )  # fmt: skip


def measure() -> dict[str, Any]:
    config = replace(load_config("sentiment"), eval_prompts=2)
    trainer = make_trainer(config)
    rollout = make_rollout(SMOLLM2_135M["vocab_size"])
    # One minibatch: the update is over all 2048 tokens, in the recipe's microbatches.
    trainer.config = replace(config, num_mini_batches=1)
    (rows,) = trainer.deal(SEQUENCES)
    layouts = trainer.cut(rollout.sequences, [rows], config.microbatch_tokens)
    experience = score(trainer.backbone, rollout, layouts, config)
    noise = torch.randn_like(experience.values)
    experience = experience.with_advantages(noise, noise)
    spec = trainer.algorithm.spec(config, 1.0, trainer.state)
    trainer.update(experience, rows, spec, first=False)  # makes the optimizer's state

    head = trainer.backbone.head
    hidden = torch.randn(SEQUENCES * RESPONSE, head.weight.shape[1], requires_grad=True)
    ones = torch.ones(len(hidden))

    def head_alone() -> None:
        linear_policy_loss(
            hidden, head.weight, rollout.responses.flatten(), -ones, ones, ones.bool(), spec,
            ref_hidden=hidden.detach() + 0.1, workspace_mb=config.workspace_mb,
        ).loss.backward()  # fmt: skip

    def one_update() -> None:
        trainer.update(experience, rows, spec, first=False)

    return {
        "bench": "update_memory",
        "model": "SmolLM2-135M shape, float32",
        "tokens": SEQUENCES * (PROMPT + RESPONSE),
        "microbatch_sequences": layouts[0].num_sequences,
        "update_extra_mb": round(extra_mb(one_update), 1),
        "head_extra_mb": round(extra_mb(head_alone), 1),
        "eager_logits_mb": round(SEQUENCES * RESPONSE * head.weight.shape[0] * 4 / 2**20, 1),
    }


if __name__ == "__main__":
    measured = measure()
    print(json.dumps(measured))
    if "--print" not in sys.argv:
        write("update_memory", [measured])
