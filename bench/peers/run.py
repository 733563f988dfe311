"""fastrlhf beside TRL, from prompts to changed weights: PPO of TRL 1.10 and GRPO of TRL 1.16.

Each side is a process with its own trainer; they take steps in turns. What they are given is in
workload.py, and each side's settings stand at the top of its file. Two parts:

- speed: 32 responses of 64 tokens; the first step is not counted. Samples and generated tokens a
  second by the median step, seconds of each phase, and the process's peak memory (VmHWM).
  Beside them stands the floor: the time that the step's matrix products alone would take at the
  rate of one product of the head's shape, measured after each turn.
- curves: 32 responses of 16 tokens, eight steps, eight seeds; the reward of every step. GRPO's mean
  reward swings by 0.1 with the four prompts of a step, so that fewer seeds say nothing.

    python bench/peers/run.py                  both, replaces rows of bench/results/peers.jsonl
    python bench/peers/run.py --part speed     one of them
    python bench/peers/run.py --algorithm ppo --weights lora    some cases
    python bench/peers/run.py --seeds 1,2,3,4  of the curves, some seeds
    python bench/peers/run.py --quick          few steps and one seed; only prints
    python bench/peers/run.py --cache FOLDER   where the peers' environments are made
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

import torch
from environments import TRL_PPO, fastrlhf_python, trl_ppo_python
from measure import percentile
from results import keep, stamp
from turns import Side
from workload import SHAPE, VOCABULARY, Workload, make_model, matrix_work

HERE = Path(__file__).parent
SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
CURVE_STEPS = 8
FLOOR = "matrix products alone"
KEY = ("part", "algorithm", "weights", "side", "seed")
"""what tells rows apart"""


def workloads(
    part: str, algorithm: str, weights: str, quick: bool, seeds: Sequence[int] = SEEDS
) -> list[Workload]:
    lora = weights == "lora"
    rate = 3e-3 if lora else 3e-4
    if part == "speed":
        steps = 2 if quick else 4 if algorithm == "ppo" else 6
        return [Workload(algorithm, lora, steps, learning_rate=rate)]
    steps = 3 if quick else CURVE_STEPS
    return [
        Workload(algorithm, lora, steps, seed, response_tokens=16, learning_rate=rate)
        for seed in seeds[: 1 if quick else None]
    ]


def commands(part: str, workload: Workload, model: Path, file: Path, cache: Path):
    """The sides of a case: name -> command."""
    ours = [str(fastrlhf_python()), str(HERE / "side_fastrlhf.py"), str(model), str(file)]
    if workload.algorithm == "grpo":
        peer = [str(fastrlhf_python()), str(HERE / "side_trl_grpo.py"), str(model), str(file)]
        return {"fastrlhf": [*ours, "none"], "TRL 1.16": peer}
    peer = [str(trl_ppo_python(cache)), str(HERE / "side_trl_ppo.py"), str(model), str(file)]
    own = {"fastrlhf, critic: adapter": [*ours, "adapter"], "TRL 1.10": peer}
    # What is learnt is compared with a value network on both sides.
    return own if part == "curves" else {"fastrlhf, critic: shared": [*ours, "shared"]} | own


def environment() -> dict[str, str]:
    """The same for all sides: no network, no notices, and threads that wait without spinning."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GOMP_SPINCOUNT": "10000",
    }
    return dict(os.environ) | quiet | {"PYTHONPATH": str(HERE)}


def run_case(part: str, workload: Workload, model: Path, cache: Path) -> list[dict[str, Any]]:
    """All sides of a case in turns; a row each."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "workload.json"
        workload.write(file)
        sides: list[Side] = []
        try:
            for name, command in commands(part, workload, model, file, cache).items():
                sides.append(Side(name, command, environment(), Path(scratch) / f"{name}.log"))
            rates: list[float] = []
            for number in range(workload.steps):
                # Who comes first moves on.
                for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                    said = side.step()
                    print(f"{side.name:26} {number} {json.dumps(said)}", flush=True)
                rates.append(matrix_rate())
            steps = {side.name: side.steps for side in sides}
        finally:
            for side in sides:
                side.close()
    if part == "curves":
        return [curve_row(workload, name, taken) for name, taken in steps.items()]
    rows = [speed_row(workload, name, taken) for name, taken in steps.items()]
    return [*rows, floor_row(workload, statistics.median(rates))]


def matrix_rate() -> float:
    """Floating-point operations a second of a microbatch's product with the head, the best of 5."""
    states = torch.randn(512, SHAPE["hidden_size"])
    weight, logits = torch.randn(VOCABULARY, SHAPE["hidden_size"]), torch.empty(512, VOCABULARY)
    best = 0.0
    for _ in range(5):
        begun = time.perf_counter()
        torch.mm(states, weight.T, out=logits)
        best = max(best, 2 * states.numel() * VOCABULARY / (time.perf_counter() - begun))
    return best


def floor_row(workload: Workload, rate: float) -> dict[str, Any]:
    seconds = matrix_work(workload) / rate
    return base_row("speed", workload, FLOOR) | {
        "seconds": round(seconds, 3),
        "samples_per_second": round(workload.batch / seconds, 3),
        "tokens_per_second": round(workload.batch * workload.response_tokens / seconds, 1),
        "gflop_per_second": round(rate / 1e9, 1),
    }


def base_row(part: str, workload: Workload, side: str) -> dict[str, Any]:
    return {
        "bench": "peers", "part": part, "algorithm": workload.algorithm,
        "weights": "lora" if workload.lora else "all", "side": side, "seed": workload.seed,
        "samples": workload.batch, "prompt_tokens": workload.prompt_tokens,
        "response_tokens": workload.response_tokens, "micro": workload.micro,
        "epochs": workload.epochs if workload.algorithm == "ppo" else 1,
        "learning_rate": workload.learning_rate,
    }  # fmt: skip


def speed_row(workload: Workload, side: str, steps: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The first step is not counted; memory is that of all."""
    counted = steps[1:]
    seconds = [step["seconds"] for step in counted]
    median = statistics.median(seconds)
    phases = {
        phase: round(statistics.median(step["phases"][phase] for step in counted), 3)
        for phase in ("rollout", "score", "update")
    }
    return base_row("speed", workload, side) | {
        "steps": len(counted),
        "seconds": round(median, 3),
        "p20": round(percentile(seconds, 0.2), 3),
        "p80": round(percentile(seconds, 0.8), 3),
        "cpu_seconds": round(statistics.median(step["cpu_seconds"] for step in counted), 3),
        "samples_per_second": round(workload.batch / median, 3),
        "tokens_per_second": round(workload.batch * workload.response_tokens / median, 1),
        "phases": phases,
        "peak_mb": round(max(step["peak_mb"] for step in steps), 1),
        "imported_mb": round(steps[0]["imported_mb"], 1),
    }


def curve_row(workload: Workload, side: str, steps: list[Mapping[str, Any]]) -> dict[str, Any]:
    return base_row("curves", workload, side) | {
        "scores": [round(step["score"], 4) for step in steps]
    }


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--part", choices=("speed", "curves"))
    parser.add_argument("--algorithm", choices=("ppo", "grpo"))
    parser.add_argument("--weights", choices=("lora", "all"))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--print", action="store_true", dest="only_print")
    parser.add_argument("--cache", type=Path)
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    cache = given.cache
    if cache is None:
        from fastrlhf.pretrained import cache_dir

        cache = cache_dir() / "peers"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for part in [given.part] if given.part else ("speed", "curves"):
            for algorithm in [given.algorithm] if given.algorithm else ("ppo", "grpo"):
                for weights in [given.weights] if given.weights else ("lora", "all"):
                    for workload in workloads(part, algorithm, weights, given.quick, seeds):
                        rows = run_case(part, workload, Path(folder), cache)
                        print("\n".join(json.dumps(row) for row in rows), flush=True)
                        if not (given.quick or given.only_print):
                            versions = {"trl": f"{importlib.metadata.version('trl')}, {TRL_PPO}"}
                            keep("peers", [stamp() | versions | row for row in rows], KEY)


if __name__ == "__main__":
    main()
