"""PPO against a reward model, judged by others: does the text get better, or only its score?

The reward is what bench/reward_model.py made of SmolLM2-135M and people's ratings of movie
reviews, a role of the policy's own backbone. Two arms differ in one setting:

kl     a penalty on the exact KL to the model before training.
none   kl_coef 0: what the reward model likes, at any price.

Judged are completions of 64 held-out prompts along the run, by VADER and by MiniLM with a ridge on
the ratings (judges.py), on neither of which anything is trained. The hacking monitor watches with
VADER as its gold judge.

    python bench/reward_model.py --output FOLDER        makes the reward model
    python bench/reward_ppo.py --reward FOLDER [--arms kl,none] [--seeds 1,2,3] [--steps N]
                               [--jobs 2] [--print]
    python bench/reward_ppo.py --figure                 only draws docs/reward_ppo.png

Puts each run's rows into bench/results/reward_ppo.jsonl in the place of those that it had.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from results import NOT_MEASURED, ROOT, as_lines, keep, read, stamp

Row = dict[str, Any]
SETTINGS: dict[str, Any] = dict(
    batch_size=32,
    num_ppo_epochs=4,
    response_length=16,
    learning_rate=3e-3,
    lr_scheduler_type="linear",
    kl_estimator="exact",
    lam=1.0,
    train_layers=4,
    critic="shared",
    eval_prompts=64,
    eval_steps=6,
    num_samples=64,
    gold="sentiment",
    reward_backbone="shared",
)
ARMS = {"kl": 0.1, "none": 0.0}
"""kl_coef; the reward model's scores have deviation 1 on people's reviews"""
NAMES = {"kl": "with a KL penalty", "none": "without"}
COLOURS = {"kl": "#1f6f8b", "none": "#c8553d"}
STEPS = 30
SHOWN = 4
"""completions of each evaluation that are kept"""


def run(arm: str, seed: int, steps: int, reward: Path) -> list[Row]:
    """Train one arm on one seed; its rows, all samples among them."""
    import torch

    from fastrlhf import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    begun, started = stamp(), time.perf_counter()
    about = {"bench": "reward_ppo", "arm": arm, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        episodes = steps * SETTINGS["batch_size"]
        config = PPOConfig(
            **SETTINGS, kl_coef=ARMS[arm], seed=seed, total_episodes=episodes,
            reward=str(reward), output_dir=f"{folder}/run",
        )  # fmt: skip
        PPOTrainer(args=config, name=f"{arm}, seed {seed}").train()

        def lines(name: str) -> list[Row]:
            path = Path(folder) / "run" / name
            return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

        rows = [about | {"kind": "run", "seconds": round(time.perf_counter() - started, 1)}]
        rows += [about | {"kind": "evaluation"} | line for line in lines("evaluations.jsonl")]
        rows += [about | {"kind": "finding"} | line for line in lines("findings.jsonl")]
        # The prompts are others' words: what the model added to them is kept, and not they.
        for line in lines("samples.jsonl"):
            kept = {key: line[key] for key in ("step", "completion", "score")}
            rows.append(about | {"kind": "sample"} | kept)
    return [begun | row for row in rows]


def one(arm: str, seed: int, steps: int, reward: Path) -> list[Row]:
    """`run` in a process of its own with one thread."""
    command = [sys.executable, __file__, "--one", f"--arms={arm}", f"--seeds={seed}"]
    done = subprocess.run(
        [*command, f"--steps={steps}", f"--reward={reward}"],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def judged(rows: list[Row]) -> list[Row]:
    """A run's rows with both judges' means in its evaluations, and few of its samples."""
    from judges import judge

    from fastrlhf.rewards.texts import sentiment

    by_step: dict[int, list[Row]] = {}
    for row in rows:
        if row["kind"] == "sample":
            by_step.setdefault(row["step"], []).append(row)
    for row in rows:
        if row["kind"] == "evaluation":
            texts = [sample["completion"] for sample in by_step[row["step"]]]
            row["vader"] = round(statistics.mean(sentiment(completions=texts)), 4)
            row["minilm"] = round(statistics.mean(judge()(texts)), 4)
            row["minilm_accuracy"] = round(judge().accuracy, 4)
    shown = [sample for samples in by_step.values() for sample in samples[:SHOWN]]
    return [row for row in rows if row["kind"] != "sample"] + shown


PANELS = (
    ("score", "What is trained on: the reward model", "mean reward"),
    ("vader", "A judge that is not: VADER", "mean sentiment, −1 to 1"),
    ("minilm", "Another: MiniLM with a ridge on ratings", "predicted rating, −4 to 4"),
    ("kl", "KL to the model before training", "nats a sequence"),
)


def draw() -> None:
    """docs/reward_ppo.png and the table of docs/reward_hacking.md, from the rows alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from results import with_tables

    rows = [row for row in read("reward_ppo") if row["kind"] == "evaluation"]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (field, title, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for arm, name in NAMES.items():
            curves = [
                [(x["step"], x[field]) for x in rows if (x["arm"], x["seed"]) == (arm, seed)]
                for seed in sorted({x["seed"] for x in rows if x["arm"] == arm})
            ]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=COLOURS[arm], lw=0.8, alpha=0.6)
            steps = sorted(set.intersection(*({s for s, _ in c} for c in curves)))
            means = [statistics.mean(dict(curve)[step] for curve in curves) for step in steps]
            axes.plot(steps, means, color=COLOURS[arm], lw=2.4, label=name)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel(unit)
        axes.set_xlabel(f"rollouts of {SETTINGS['batch_size']} episodes")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("PPO against a reward model, on held-out prompts (thin: seeds, thick: means)")
    figure.savefig(ROOT / "docs" / "reward_ppo.png", dpi=100)
    page = ROOT / "docs" / "reward_hacking.md"
    page.write_text(with_tables(page.read_text(), TABLES))


def table() -> str:
    """A line for each run: every judge before and after, and what the monitor said first."""
    rows = read("reward_ppo")
    if not rows:
        return NOT_MEASURED
    lines = [
        "![the reward model's scores, two judges' and the KL along training](reward_ppo.png)",
        "",
        "| arm | seed | reward model | VADER | MiniLM | KL | distinct-2 | signs, first at |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, seed in sorted({(row["arm"], row["seed"]) for row in rows}):
        own = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        first, *_, last = (row for row in own if row["kind"] == "evaluation")
        moved = [f"{first[x]:+.2f} → {last[x]:+.2f}" for x in ("score", "vader", "minilm")]
        signs = [f"{x['sign']} ({x['step']})" for x in own if x["kind"] == "finding"]
        lines.append(
            f"| {NAMES[arm]} | {seed} | {' | '.join(moved)} | {last['kl']:.2f} "
            f"| {last['distinct_2']:.2f} | {', '.join(signs) or 'none'} |"
        )
    told = next(row for row in rows if row["kind"] == "evaluation")
    lines += [
        "",
        f"Held-out prompts, before → after {last['step']} rollouts. MiniLM with its ridge orders "
        f"{told['minilm_accuracy']:.3f} of held-out pairs of ratings as people did. Measured on "
        f"{told['device']}, torch {told['torch']}.",
    ]
    return "\n".join(lines)


TABLES = {"reward_ppo": table}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="PPO against a reward model, judged by others.")
    parser.add_argument("--reward", type=Path)
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
        if given.reward is None:
            sys.exit("give the reward model's folder: --reward; bench/reward_model.py makes it")
        pairs = [(a, int(s)) for s in given.seeds.split(",") for a in given.arms.split(",")]
        if given.one:
            print(as_lines(run(*pairs[0], given.steps, given.reward)), end="")
            return
        with ThreadPoolExecutor(given.jobs) as pool:
            for made in pool.map(lambda pair: one(*pair, given.steps, given.reward), pairs):
                rows = judged(made)
                print(as_lines(rows), end="", flush=True)
                if not given.print:
                    keep("reward_ppo", rows, ("arm", "seed"))
        if given.print:
            return
    draw()


if __name__ == "__main__":
    main()
