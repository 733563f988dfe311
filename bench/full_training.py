"""Bytes a parameter of full training in bfloat16, stepped in the backward, at SmolLM2-135M's shape.

Weights 2, 8-bit moments 2, the largest gradient, and nothing else that grows with the model: no
reference (kl_coef 0), and a critic that is a head on the policy's hidden states. Weights are
random: memory does not depend on their values. Linux only.

What is measured is the process's resident high-water mark (VmHWM) over three steps, of which the
first makes the optimizer's states, less what was resident before the model was made and after the
same steps of a tiny model, which load what any training needs.
Beyond activations: less the bytes that the forward keeps for the backward, counted once in a step
of their own (`saved_tensors_hooks`, a storage once, parameters and the head's gradients left out).
All else counts: gradients, the float32 sums of the head's gradient, its workspace, temporaries and
what malloc keeps for itself.

    python bench/full_training.py            rewrites bench/results/full_training.jsonl
    python bench/full_training.py --print    only prints the rows
"""

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from peak import status_mb
from results import write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from update_memory import SMOLLM2_135M

from fastrlhf import PPOConfig
from fastrlhf.heads import ValueHead
from fastrlhf.host_memory import map_large_blocks, spares_memory
from fastrlhf.optim import make_optimizer, make_schedule
from fastrlhf.step import Updater
from fastrlhf_kernels import PolicyLossSpec, linear_policy_loss, value_loss

CONFIG = PPOConfig(
    use_peft=False, bf16=True, kl_coef=0.0, learning_rate=1e-6, batch_size=8, total_episodes=8,
    microbatch_tokens=512, optimizer_in_backward=True, workspace_mb=48,
)  # fmt: skip
WAYS = {
    "norm": {"grad_clip": "norm"},
    "per_parameter": {"grad_clip": "per_parameter"},
    "at_the_end": {"optimizer_in_backward": False},
}
SEQUENCES, LENGTH = 8, 64


class Part(NamedTuple):
    loss: Tensor

    def detached(self) -> Self:
        return self._replace(loss=self.loss.detach())


class Policy(nn.Module):
    """A language model whose output layer is its embedding, and a critic on its hidden states."""

    def __init__(self, shape: dict[str, Any], *, checkpointing: bool = False):
        super().__init__()
        torch.manual_seed(0)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
        self.model = model.to_empty(device="cpu").eval()
        self.model.tie_weights()
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.02)
        rotary = self.model.model.rotary_emb
        rotary.__init__(config=self.model.config)
        self.value_head = ValueHead(shape["hidden_size"])
        if checkpointing:
            for layer in self.model.model.layers:
                layer.forward = partial(
                    torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False
                )

    def loss(self, tokens: Tensor) -> Part:
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        noise = torch.ones(tokens.shape[0], tokens.shape[1] - 1)
        mask = noise.bool()
        policy = linear_policy_loss(
            hidden, self.model.lm_head.weight, tokens[:, 1:], -noise, noise, mask,
            PolicyLossSpec(kl_coef=0.0), workspace_mb=CONFIG.workspace_mb,
        )  # fmt: skip
        values = self.value_head(hidden)
        value = value_loss(values, values.detach(), noise, mask, cliprange_value=0.2)
        return Part(policy.loss + CONFIG.vf_coef * value.loss)


def activation_mb(policy: Policy, tokens: Tensor) -> float:
    """MiB that the forward keeps for the backward."""
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}
    storages = []  # held while we count, so that no address is used again

    def pack(x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            storages.append(storage)
        # Not the tensor: its graph would hold it and it its graph, and neither would be freed.
        return None

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        policy.loss(tokens)
    return sum(kept.values()) / 2**20


def steps(policy: Policy, config: PPOConfig, tokens: Tensor, count: int = 3) -> None:
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config)
    updater = Updater(optimizer, make_schedule(optimizer, config), config)
    for _ in range(count):
        updater.update([lambda: policy.loss(tokens)])


def measure(way: str, checkpointing: bool) -> dict[str, Any]:
    config = replace(CONFIG, **WAYS[way])
    if spares_memory(config):  # as `load_backbone` does
        map_large_blocks()
    tiny = SMOLLM2_135M | {"num_hidden_layers": 1, "vocab_size": 2048}
    torch.manual_seed(1)
    tokens = torch.randint(3, 2048, (SEQUENCES, LENGTH))
    steps(Policy(tiny, checkpointing=checkpointing), config, tokens)
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    trim(0)
    before = status_mb("VmRSS")
    policy = Policy(SMOLLM2_135M, checkpointing=checkpointing)
    parameters = sum(p.numel() for p in policy.parameters())
    activations = activation_mb(policy, tokens)
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    steps(policy, config, tokens)
    peak = status_mb("VmHWM") - before
    return {
        "bench": "full_training",
        "model": "SmolLM2-135M shape, bfloat16",
        "parameters": parameters,
        "tokens": tokens.numel(),
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
