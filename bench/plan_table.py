"""Plans of common models on GPUs of 8 to 24 GB, for docs/memory.md. Planned, not measured.

python bench/plan_table.py [MODEL ...]    rewrites bench/results/plans.jsonl
"""

import sys
import warnings

from results import read, write

from fastrlhf import PPOConfig
from fastrlhf.architectures import architecture
from fastrlhf.errors import UserError
from fastrlhf.memory import parse_size
from fastrlhf.memory_advice import fit

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen3-4B", "Qwen3-8B", "Llama-3.1-8B")
BUDGETS = ("8GB", "12GB", "16GB", "24GB")


def main() -> None:
    warnings.simplefilter("ignore")
    chosen = sys.argv[1:] or MODELS
    rows = [row for row in read("plans") if row["model"] not in chosen]
    for model in chosen:
        for budget in BUDGETS:
            config = PPOConfig(
                model=model, bf16=True, train_layers="all", microbatch_tokens=2048, batch_size=8,
                total_episodes=8, response_length=256, eval_prompts=8,
            )  # fmt: skip
            row = {"bench": "plans", "model": model, "budget": budget, "planned": True}
            try:
                found = fit(config, parse_size(budget), model_config=architecture(model))
                row |= {"needed": found.plan.needed, "changes": [str(x) for x in found.changes]}
                row |= {"phases": dict(found.plan.phases)}
            except UserError as error:
                row |= {"needed": None, "refused": str(error)}
            rows.append(row)
            print(model, budget, row.get("changes", row.get("refused")), flush=True)
            write("plans", rows)


if __name__ == "__main__":
    main()
