"""A policy over response modes against flat PPO, at equal samples, on SmolLM2-135M.

Two kinds of prompts want different answers (mode_prompts.py). Every arm has the same settings,
prompts, seeds and number of episodes; the low level of each is the same adapter.

hierarchical  three modes, each with an example for its instruction, picked by the high level
random        the same modes, picked evenly: what the examples do without a choice
listed        flat PPO, every prompt preceded by all three examples
flat          flat PPO

    python bench/hierarchical.py [--arms hierarchical,flat] [--seeds 1,2] [--jobs 1] [--quick]
                                 [--print] [key=value …]
    python bench/hierarchical.py --figure      only draws docs/hierarchical.png from the rows

Puts each run's rows into bench/results/hierarchical.jsonl in the place of those that it had (with
--print: only prints) and draws the figure. --quick: three rollouts, nothing is kept.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import yaml
from results import as_lines, keep, stamp

SETTINGS: dict[str, Any] = dict(
    model="smollm2-135m",
    total_episodes=144,
    batch_size=16,
    num_ppo_epochs=2,
    num_mini_batches=1,
    response_length=12,
    stop_token=None,
    temperature=0.6,
    learning_rate=2e-3,
    kl_coef=0.02,
    lam=1.0,
    train_layers=2,
    microbatch_tokens=1024,
    eval_steps=3,
    num_samples=0,
    save_steps=None,
)
ARMS = ("hierarchical", "random", "flat")


def trainer(arm: str, config: dict[str, Any]) -> Any:
    from mode_prompts import EXAMPLES, fitting, rows

    from fastrlhf import HierarchicalConfig, HierarchicalTrainer, PPOConfig, PPOTrainer

    train, held_out = rows()
    if arm in ("hierarchical", "random"):
        rate = {"mode_learning_rate": 0.0} if arm == "random" else {}
        args = HierarchicalConfig(modes=EXAMPLES, **config | rate)
        return HierarchicalTrainer(None, fitting, args, train, held_out)
    if arm == "listed":
        for row in (*train, *held_out):
            row["prompt"] = "".join(EXAMPLES.values()) + row["prompt"]
    return PPOTrainer(None, fitting, PPOConfig(**config), train, held_out)


def run(arm: str, seed: int, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Train one arm on one seed; a row for each evaluation, with its scores and modes by kind."""
    import torch

    torch.set_num_threads(1)
    begun, started = stamp(), time.perf_counter()
    about = {"bench": "hierarchical", "arm": arm, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        config = SETTINGS | given | {"seed": seed, "output_dir": f"{folder}/run"}
        made = trainer(arm, config)
        kinds = [row["kind"] for row in made.held_out.rows]
        made.train()
        seconds = time.perf_counter() - started

        def lines(name: str) -> list[dict[str, Any]]:
            text = (Path(folder) / "run" / name).read_text()
            return [json.loads(line) for line in text.splitlines()]

        samples = lines("samples.jsonl")
        made_rows = []
        for line in lines("evaluations.jsonl"):
            own = [sample for sample in samples if sample["step"] == line["step"]]
            figures = {k: round(line[k], 5) for k in ("score", "kl", "entropy", "distinct_2")}
            episodes = line["step"] * config["batch_size"]
            made_rows.append(about | {"episodes": episodes} | figures | by_kind(own, kinds))
    made_rows[-1] |= {"seconds": round(seconds, 1)}
    return [begun | row for row in made_rows]


def by_kind(samples: Sequence[dict[str, Any]], kinds: Sequence[str]) -> dict[str, Any]:
    """Mean score, share of each mode and an example, for each kind of prompt."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(kinds):
        own = [sample for sample, of in zip(samples, kinds, strict=True) if of == kind]
        modes = [sample["mode"] for sample in own if "mode" in sample]
        found[kind] = {
            "score": round(statistics.mean(sample["score"] for sample in own), 5),
            "modes": {mode: round(modes.count(mode) / len(modes), 4) for mode in sorted({*modes})},
            "example": [own[0].get("mode"), " ".join(own[0]["completion"].split())],
        }
    return {"by_kind": found}


def one(arm: str, seed: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """`run` in a process of its own with one thread."""
    command = [sys.executable, __file__, "--one", f"--arms={arm}", f"--seeds={seed}", *words]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept(rows: list[dict[str, Any]], only_print: bool) -> list[dict[str, Any]]:
    """Put a run's rows into the results, unless they are only to be printed."""
    if not only_print:
        keep("hierarchical", rows, ("arm", "seed"))
    return rows


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hierarchical against flat PPO.")
    parser.add_argument("--arms", default=",".join(ARMS), help="and listed, which takes longer")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="three rollouts, nothing is kept")
    parser.add_argument("--print", action="store_true", help="print rows, write nothing")
    parser.add_argument("--figure", action="store_true", help="only draw the figure")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser.parse_args()


def main() -> None:
    given = options()
    if not given.figure:
        words = given.settings
        if given.quick:
            words = ["total_episodes=48", *words]
        pairs = [
            (arm, int(seed)) for seed in given.seeds.split(",") for arm in given.arms.split(",")
        ]
        if given.one:
            settings = {k: yaml.safe_load(v) for k, v in (word.split("=", 1) for word in words)}
            print(as_lines(run(*pairs[0], settings)), end="")
            return
        only_print = given.print or given.quick
        with ThreadPoolExecutor(given.jobs) as pool:
            made = pool.map(lambda pair: kept(one(*pair, words), only_print), pairs)
            rows = [row for part in made for row in part]
        if only_print:
            print(as_lines(rows), end="")
            return
    from hierarchical_figure import draw

    draw()


if __name__ == "__main__":
    main()
