"""fastrlhf's own side, with the settings of the peers where the peers have a choice.

Settings that are not the defaults: KL by k1 in the reward, no stop token, torch's AdamW with states
in float32, TRL's epsilon, constant learning rate, no clipping for PPO (TRL's does not clip),
microbatches of as many tokens. GRPO takes the log-probabilities of sampling for the old ones and
has no reference: TRL's, too, runs nothing again before its one update, and has none at beta 0.
With LoRA, adapters are in all layers: there is no trunk to keep.

    python side_fastrlhf.py MODEL WORKLOAD CRITIC ORDERS RESULTS
"""

import sys
import tempfile

from turns import Gate
from workload import Reward, Workload, load_tokenizer, prompts

from fastrlhf import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer


def main(model: str, workload: Workload, critic: str, folder: str) -> None:
    gate, reward = Gate(), Reward()
    length = workload.prompt_tokens + workload.response_tokens
    settings = dict(
        model=model, output_dir=f"{folder}/run", seed=workload.seed, eval_prompts=8, num_samples=0,
        total_episodes=workload.steps * workload.batch, batch_size=workload.batch,
        num_mini_batches=1, microbatch_tokens=workload.micro * length,
        response_length=workload.response_tokens, stop_token=None, temperature=1.0,
        learning_rate=workload.learning_rate, lr_scheduler_type="constant",
        adam_eps=workload.adam_eps, optim="adamw_torch", max_grad_norm=workload.max_grad_norm,
        train_layers="all", use_peft=workload.lora, lora_rank=workload.rank,
        lora_alpha=workload.alpha, bf16=workload.bf16,
        gradient_checkpointing=workload.checkpointing,
    )  # fmt: skip
    if workload.algorithm == "ppo":
        settings |= dict(
            num_ppo_epochs=workload.epochs, kl_coef=workload.kl_coef, kl_estimator="k1",
            max_grad_norm=1e9, critic=critic,
        )  # fmt: skip
        trainer_class, args = PPOTrainer, PPOConfig(**settings)
    else:
        settings |= dict(num_generations=workload.generations, old_logprobs="sampled")
        trainer_class, args = GRPOTrainer, GRPOConfig(**settings)
    rows = [{"prompt": text} for text in prompts(workload)]
    trainer = trainer_class(
        reward_funcs=reward, args=args, train_dataset=rows, processing_class=load_tokenizer(model)
    )
    for number, batch in enumerate(trainer.batches(), start=1):
        gate.wait()
        line = trainer.step(number, batch)
        phases = {phase: line[f"time/{phase}"] for phase in ("rollout", "score", "update")}
        gate.done(reward.last, phases)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], Workload.read(sys.argv[2]), sys.argv[3], folder)
