"""Bytes a parameter of full training in bfloat16, stepped in the backward, at SmolLM2-135M's shape.

Weights 2, 8-bit moments 2, the largest gradient, and nothing else that grows with the model: no
reference (kl_coef 0), and a critic that is a head on the policy's hidden states. The backbone is
loaded, scored with and updated as in a run; only the weights, on whose values memory does not
depend, and the rollout are random. Linux only.

What is measured is the process's resident high-water mark (VmHWM) over scoring and three updates,
of which the first makes the optimizer's states, less what was resident before the model was made
and after the same of a tiny model, which loads what any training needs.
Beyond activations: less the bytes that the forward keeps for the backward, counted once in a
forward of their own (`saved_tensors_hooks`, a storage once, parameters and the head's gradients
left out). All else counts: gradients, the float32 sums of the head's gradient, its workspace,
temporaries and what malloc keeps for itself.

    python bench/full_training.py            rewrites bench/results/full_training.jsonl
    python bench/full_training.py --print    only prints the rows
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from peak import status_mb
from results import write
from transformers import LlamaConfig, LlamaForCausalLM
from update_memory import PROMPT, SMOLLM2_135M, Tokenizer, make_rollout

from fastrlhf import PPOConfig, PPOTrainer
from fastrlhf.experience import gather, score
from fastrlhf.loading import load_backbone
from fastrlhf.losses import microbatch_loss
from fastrlhf.types import Experience

SEQUENCES, RESPONSE, VOCAB = 8, 56, 2048
CONFIG = PPOConfig(
    use_peft=False, train_layers="all", kl_coef=0.0, critic="shared", bf16=True,
    optim="adamw_8bit", optimizer_in_backward=True, learning_rate=1e-6, batch_size=SEQUENCES,
    total_episodes=SEQUENCES, response_length=RESPONSE, eval_prompts=2, microbatch_tokens=512,
)  # fmt: skip
WAYS = {
    "norm": {"grad_clip": "norm"},
    "per_parameter": {"grad_clip": "per_parameter"},
    "at_the_end": {"optimizer_in_backward": False},
}


class RandomWeights:
    """A model to load (`loading.Source`) whose file nobody needs."""

    def __init__(self, shape: dict[str, Any]):
        self.config = LlamaConfig(**shape)

    def load(self, *, dtype: torch.dtype, device: str, quantization: None) -> LlamaForCausalLM:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config).to(dtype)
        model = model.to_empty(device=device)
        model.tie_weights()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.model.rotary_emb.__init__(config=self.config)
        return model.eval()


def make_trainer(shape: dict[str, Any], config: PPOConfig) -> PPOTrainer:
    return PPOTrainer(
        load_backbone(RandomWeights(shape), config, "cpu"),
        lambda completions, **_: [0.0] * len(completions),
        config,
        [{"prompt": str(i)} for i in range(8)],
        processing_class=Tokenizer(),
    )


def scored(trainer: PPOTrainer) -> Experience:
    torch.manual_seed(1)
    rollout = make_rollout(VOCAB, SEQUENCES, RESPONSE)
    layouts = trainer.cut(rollout.sequences, [torch.arange(SEQUENCES)], CONFIG.microbatch_tokens)
    experience = score(trainer.backbone, rollout, layouts, trainer.config)
    noise = torch.randn_like(experience.old_logprobs)
    return experience.with_advantages(noise, noise)


def updates(trainer: PPOTrainer, count: int = 3) -> None:
    """Score a rollout and update on it."""
    experience, spec = scored(trainer), trainer.algorithm.spec(trainer.config, 1.0, trainer.state)
    for number in range(count):
        trainer.update(experience, torch.arange(SEQUENCES), spec, first=number == 0)


def activation_mb(trainer: PPOTrainer) -> float:
    """MiB that the forward of a microbatch keeps for the backward."""
    parameters = {p.untyped_storage().data_ptr() for p in trainer.backbone.parameters()}
    kept: dict[int, int] = {}
    storages = []  # held while we count, so that no address is used again

    def pack(x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            storages.append(storage)
        # Not the tensor: its graph would hold it and it its graph, and neither would be freed.
        return None

    config, experience = trainer.config, scored(trainer)
    (layout,) = trainer.cut(
        experience.sequences, [torch.arange(SEQUENCES)], config.microbatch_tokens
    )
    spec = trainer.algorithm.spec(config, 1.0, trainer.state)
    batch = gather(trainer.backbone, experience, layout)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        microbatch_loss(trainer.backbone, batch, spec, config, SEQUENCES * RESPONSE)
    return sum(kept.values()) / 2**20


def measure(way: str, checkpointing: bool) -> dict[str, Any]:
    config = replace(CONFIG, **WAYS[way], gradient_checkpointing=checkpointing)
    updates(make_trainer(SMOLLM2_135M | {"num_hidden_layers": 1, "vocab_size": VOCAB}, config))
    gc.collect()
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    trim(0)
    before = status_mb("VmRSS")
    trainer = make_trainer(SMOLLM2_135M, config)
    parameters = sum(p.numel() for p in trainer.backbone.parameters())
    activations = activation_mb(trainer)
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    updates(trainer)
    peak = status_mb("VmHWM") - before
    return {
        "bench": "full_training",
        "model": "SmolLM2-135M shape, bfloat16",
        "parameters": parameters,
        "tokens": SEQUENCES * (PROMPT + RESPONSE),
        "step": "at the end" if way == "at_the_end" else f"in the backward, grad_clip {way}",
        "gradient_checkpointing": checkpointing,
        "peak_mb": round(peak, 1),
        "activations_mb": round(activations, 1),
        "bytes_a_parameter": round((peak - activations) * 2**20 / parameters, 2),
    }


def measured_alone(way: str, checkpointing: bool) -> dict[str, Any]:
    """In a process of its own: what malloc keeps of one way must not hide the next one's peak."""
    command = [sys.executable, __file__, "--one", way, *["--checkpointing"] * checkpointing]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if "--one" in sys.argv:
        way = sys.argv[sys.argv.index("--one") + 1]
        print(json.dumps(measure(way, "--checkpointing" in sys.argv)))
    else:
        rows = [measured_alone(way, checkpoint) for way in WAYS for checkpoint in (False, True)]
        for row in rows:
            print(json.dumps(row))
        if "--print" not in sys.argv:
            write("full_training", rows)
