"""GRPO of TRL 1.16, as its users would set it for the same work.

Settings: loss_type grpo, beta 0, one iteration, groups of 8, advantages divided by the group's
deviation; the whole rollout generated in one batch; one optimizer step a rollout, of as many
microbatches as ours; fused AdamW without decay, constant learning rate. Off: gradient
checkpointing, 16-bit floats, evaluation, saving, reporting, progress bars, logging of completions.

    python side_trl_grpo.py MODEL WORKLOAD ORDERS RESULTS
"""

import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import Gate
from workload import Reward, Workload, load_tokenizer, prompts


class Timed(GRPOTrainer):
    """Notes when generation and scoring end."""

    def _generate(self, *args, **kwargs):
        begun = time.perf_counter()
        result = super()._generate(*args, **kwargs)
        self.phases["rollout"] = time.perf_counter() - begun
        return result

    def _generate_and_score_completions(self, *args, **kwargs):
        self.phases = {}
        begun = time.perf_counter()
        result = super()._generate_and_score_completions(*args, **kwargs)
        self.phases["score"] = time.perf_counter() - begun - self.phases["rollout"]
        return result


class Turns(TrainerCallback):
    def __init__(self, gate: Gate, reward: Reward):
        self.gate, self.reward, self.trainer = gate, reward, None

    def on_step_begin(self, *args, **kwargs):
        self.gate.wait()

    def on_step_end(self, *args, **kwargs):
        phases = self.trainer.phases
        phases["update"] = time.perf_counter() - self.gate.begun - sum(phases.values())
        self.gate.done(self.reward.last, phases)


def main(model: str, workload: Workload, folder: str) -> None:
    gate, reward = Gate(), Reward()
    turns = Turns(gate, reward)
    args = GRPOConfig(
        output_dir=folder, max_steps=workload.steps, seed=workload.seed,
        per_device_train_batch_size=workload.micro,
        gradient_accumulation_steps=workload.batch // workload.micro,
        num_generations=workload.generations, num_iterations=1,
        max_completion_length=workload.response_tokens,
        temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=0.2, loss_type="grpo",
        scale_rewards="group", mask_truncated_completions=False,
        learning_rate=workload.learning_rate, lr_scheduler_type="constant",
        optim="adamw_torch_fused", adam_epsilon=workload.adam_eps, weight_decay=0.0,
        max_grad_norm=workload.max_grad_norm, bf16=workload.bf16,
        gradient_checkpointing=workload.checkpointing,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, report_to="none",
        logging_strategy="no", save_strategy="no", eval_strategy="no",
    )  # fmt: skip
    lora = LoraConfig(
        r=workload.rank, lora_alpha=workload.alpha, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts(workload)}),
        processing_class=load_tokenizer(model),
        peft_config=lora if workload.lora else None,
        callbacks=[turns],
    )
    turns.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], Workload.read(sys.argv[2]), folder)
