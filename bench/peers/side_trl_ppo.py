"""PPO of TRL 1.10, the last that has it (`trl.experimental.ppo`), as its users would set it.

Settings: 4 epochs of one minibatch, KL by k1 in the reward, GAE with lam 0.95, clipped values; the
whole rollout generated and scored in one batch; as many microbatches as ours; fused AdamW without
decay, constant learning rate. Off: gradient checkpointing, 16-bit floats, sample generation,
evaluation, saving, reporting, progress bars.

Its value network is a network of its own, and it takes a reward model: the model's stands in for
one, a reward function in its clothes. With LoRA the value network has adapters too, put into it by
PEFT (TRL would train all of it), and no second policy is there as a reference.

    python side_trl_ppo.py MODEL WORKLOAD ORDERS RESULTS
"""

import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from turns import Gate
from workload import VOCABULARY, Workload, load_tokenizer, prompts


class ShareOfFirstHalf(nn.Module):
    """`workload.Reward` as a reward model: its "states" at each token are the score up to there."""

    base_model_prefix = "share"

    def __init__(self, prompt_tokens: int, response_tokens: int):
        super().__init__()
        self.prompt_tokens, self.response_tokens = prompt_tokens, response_tokens
        self.last = 0.0

    def share(self, input_ids, **others):
        counts = (input_ids[:, self.prompt_tokens :] < VOCABULARY // 2).float().cumsum(1)
        shares = counts / self.response_tokens
        self.last = float(shares[:, -1].mean())
        before = shares.new_zeros(len(shares), self.prompt_tokens)
        return SimpleNamespace(hidden_states=[torch.cat([before, shares], 1)[..., None]])

    def score(self, states):
        return states


class Turns(TrainerCallback):
    """Also notes when generation ends and when the first forward of the update begins."""

    def __init__(self, gate: Gate, reward: ShareOfFirstHalf):
        self.gate, self.reward = gate, reward
        self.phases: dict[str, float] = {}
        generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def timed_generation(*args, **kwargs):
            result = generation(*args, **kwargs)
            self.phases = {"rollout": time.perf_counter() - self.gate.begun}
            return result

        def timed_forward(*args, **kwargs):
            if torch.is_grad_enabled() and "score" not in self.phases:
                passed = time.perf_counter() - self.gate.begun
                self.phases["score"] = passed - self.phases["rollout"]
            return forward(*args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward

    def on_train_begin(self, *args, **kwargs):
        self.gate.wait()

    def on_step_end(self, *args, **kwargs):
        passed = time.perf_counter() - self.gate.begun
        self.phases["update"] = passed - sum(self.phases.values())
        self.gate.done(self.reward.last, self.phases)
        self.gate.wait()


def main(model: str, workload: Workload, folder: str) -> None:
    gate = Gate()
    reward = ShareOfFirstHalf(workload.prompt_tokens, workload.response_tokens)
    args = PPOConfig(
        output_dir=folder, total_episodes=workload.steps * workload.batch, seed=workload.seed,
        per_device_train_batch_size=workload.micro,
        gradient_accumulation_steps=workload.batch // workload.micro,
        num_ppo_epochs=workload.epochs, num_mini_batches=1,
        local_rollout_forward_batch_size=workload.batch,
        response_length=workload.response_tokens, stop_token=None, temperature=1.0,
        kl_coef=workload.kl_coef, kl_estimator="k1", cliprange=0.2, cliprange_value=0.2,
        vf_coef=0.1, gamma=1.0, lam=0.95, whiten_rewards=False, num_sample_generations=0,
        learning_rate=workload.learning_rate, lr_scheduler_type="constant",
        optim="adamw_torch_fused", adam_epsilon=workload.adam_eps, weight_decay=0.0,
        gradient_checkpointing=workload.checkpointing, bf16=workload.bf16,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True, report_to="none", logging_strategy="no", save_strategy="no",
        eval_strategy="no",
    )  # fmt: skip
    settings = dict(
        r=workload.rank, lora_alpha=workload.alpha, lora_dropout=0.0,
        target_modules=[
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
        ],
    )  # fmt: skip
    tokenizer = load_tokenizer(model)
    value_model = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    if workload.lora:
        head = value_model.score
        inject_adapter_in_model(LoraConfig(**settings), value_model)
        head.weight.requires_grad_(True)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in prompts(workload)]
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=None,
        reward_model=reward,
        value_model=value_model,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        peft_config=LoraConfig(**settings, task_type="CAUSAL_LM") if workload.lora else None,
        callbacks=[Turns(gate, reward)],
    )
    trainer.train()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], Workload.read(sys.argv[2]), folder)
