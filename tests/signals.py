"""A toy game for two agents on the tiny model, and what tests ask of its trainer."""

import json
from dataclasses import dataclass, replace

import tiny
import torch

from fastrlhf import MultiAgentConfig, MultiAgentTrainer, SharedBackbone
from fastrlhf.backbone import LoraSettings

FAST = MultiAgentConfig(
    total_episodes=64, batch_size=16, learning_rate=1e-2, lr_scheduler_type="constant",
    train_layers=2, lora_rank=8, kl_coef=0.01, microbatch_tokens=10**4, eval_prompts=8,
    num_samples=0, save_steps=None, snapshot_steps=2, matrix_games=0,
)  # fmt: skip


@dataclass(frozen=True)
class Signals:
    """The speaker knows one of two letters; the listener is to answer with half of the alphabet."""

    name: str = "signals"
    agents: tuple = ("speaker", "listener")
    max_turns: int = 2
    bounds: tuple = (0.0, 1.0)
    stop: str | None = None
    speaker_tokens: int = 1

    @property
    def turn_tokens(self):
        return {"speaker": self.speaker_tokens, "listener": 1}

    def deal(self, count, generator, held_out):
        return [{"target": "ab"[i % 2]} for i in range(count)]

    def next_agent(self, dialogue):
        return self.agents[len(dialogue.turns)] if len(dialogue.turns) < 2 else None

    def prompt(self, dialogue, agent):
        if agent == "speaker":
            return f"s{dialogue.start['target']}"
        return f"l {dialogue.turns[0].text or ' '}"

    def found(self, dialogue):
        answer = dialogue.turns[1].text
        return bool(answer) and ((answer < "n") == (dialogue.start["target"] == "a"))

    def rewards(self, dialogue):
        return [float(self.found(dialogue))] * 2

    def won(self, dialogue, agent):
        return float(self.found(dialogue))

    def figures(self, dialogues):
        return {"success": sum(map(self.found, dialogues)) / len(dialogues)}


def trainer(tmp_path, game=None, **changes) -> MultiAgentTrainer:
    config = replace(FAST, output_dir=str(tmp_path / "run"), **changes)
    torch.manual_seed(config.seed)
    backbone = SharedBackbone(
        tiny.model(), lora=LoraSettings(8, 32.0), train_layers=2, critic=config.critic
    )
    return MultiAgentTrainer(backbone, game or Signals(), config, tiny.tokenizer())


def lines(tmp_path, name="metrics.jsonl"):
    return [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]


def numbers(backbone, agent):
    return [p.detach().clone() for p in backbone.role_parameters(agent)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
