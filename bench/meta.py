"""Meta-training on SmolLM2-135M: are new rewards learnt in fewer rollouts from its initialisation?

The family: readers of movie reviews. All of them want the opening of a review to become a question,
which the base hardly ever makes of it, and each one thing of his own. Five readers are trained on,
three others are held out, and so are the prompts that score.

meta    Reptile on the four readers, then an adaptation to each of the two
base    the same adaptations from the base
joint   RLOO on the mean of the four rewards, as many completions, then the same adaptations; only
        with --joint, for it takes as long as the two others

    python bench/meta.py [--seeds 1,2] [--joint] [--quick] [--jobs 1] [--print]
    python bench/meta.py --figure            only draws docs/meta.png from the rows

Puts each seed's rows into bench/results/meta.jsonl in the place of those that it had (with --print:
only prints), draws the figure and writes the table of docs/meta.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from results import as_lines, keep, stamp

SETTINGS: dict[str, Any] = dict(
    dataset="movie-reviews",
    algorithm="rloo",
    batch_size=32,
    num_generations=4,
    response_length=12,
    stop_token=None,
    learning_rate=2e-3,
    lr_scheduler_type="constant",
    kl_coef=0.04,
    kl_estimator="exact",
    train_layers=4,
    microbatch_tokens=1024,
    num_samples=0,
    eval_prompts=96,
    save_steps=None,
)
META: dict[str, Any] = dict(
    method="reptile", meta_steps=16, meta_batch_size=1, inner_steps=4, eval_adaptation=6,
    eval_every=2,
)  # fmt: skip
QUICK: dict[str, Any] = dict(meta_steps=1, meta_batch_size=2, inner_steps=1, eval_adaptation=1)
STATED = 0.3
"""what a sentence that ends as no question is worth"""


def question(text: str) -> float:
    """1 if the first sentence is a question, STATED if it has another end, 0 without an end."""
    end = re.search("[.!?]", text)
    if end is None or not text[: end.start()].strip():
        return 0.0
    return 1.0 if end.group() == "?" else STATED


def reader(own: Callable[[str], float]) -> Callable[..., list[float]]:
    """One who wants a question and ``own``, from 0 to 1, of the text."""

    def reward(completions: Sequence[str], **_: object) -> list[float]:
        return [(question(text) + own(text)) / 2 for text in completions]

    return reward


def sounds(sign: float) -> Callable[[str], float]:
    from fastrlhf.rewards.functions import sentiment

    return lambda text: (1 + sign * sentiment(completions=[text])[0]) / 2


def says(words: str) -> Callable[[str], float]:
    wanted = set(words.split())
    return lambda text: float(bool(wanted & set(re.findall(r"[a-z']+", text.lower()))))


def readers() -> tuple[dict[str, Any], dict[str, Any]]:
    """The rewards that are trained on, and those that are held out."""
    known = {
        "positive": sounds(1.0),
        "to the reader": says("you your yours"),
        "in the first person": says("i i'm i've me my we our us"),
        "with an objection": says("but though although despite yet however no not never"),
        "in the past": says("was were had did been"),
    }
    held_out = {
        "negative": sounds(-1.0),
        "with a comma": lambda text: float("," in text),
        "in the third person": says("he she they him her them his their"),
    }
    return (
        {name: reader(own) for name, own in known.items()},
        {name: reader(own) for name, own in held_out.items()},
    )


def mean_of(rewards: Sequence[Callable[..., list[float]]]) -> Callable[..., list[float]]:
    def reward(**given: Any) -> list[float]:
        each = zip(*(one(**given) for one in rewards), strict=True)
        return [sum(scores) / len(scores) for scores in each]

    return reward


def joint_curves(config: Any, folder: str) -> list[tuple[str, dict[str, Any]]]:
    """The held-out curves after as many completions on the mean of the rewards."""
    from fastrlhf import MetaTrainer, PPOTrainer, RLOOConfig

    tasks, held_out = readers()
    settings = SETTINGS | {"total_episodes": config.total_episodes, "seed": config.seed}
    joint = PPOTrainer(
        "smollm2-135m", mean_of(list(tasks.values())), RLOOConfig(**settings, output_dir=folder)
    )
    joint.train()
    tokenizer = joint.callbacks.given["processing_class"]
    start = MetaTrainer(
        joint.backbone, tasks, config, processing_class=tokenizer, eval_tasks=held_out
    )
    found = []
    for name in held_out:
        made = start.adapt(name, config.eval_adaptation, every=config.eval_every)
        found.append(("joint", {"task": name, "after": made.steps, "score": made.scores}))
    return found


def run(seed: int, quick: bool, joint: bool) -> list[dict[str, Any]]:
    """The arms on one seed; their curves, a row a point."""
    import torch

    from fastrlhf import MetaConfig, MetaTrainer

    torch.set_num_threads(1)
    begun, started = stamp(), time.perf_counter()
    tasks, held_out = readers()
    meta = META | (QUICK if quick else {})
    with tempfile.TemporaryDirectory() as folder:
        config = MetaConfig(**SETTINGS, **meta, seed=seed, output_dir=f"{folder}/meta")
        trainer = MetaTrainer("smollm2-135m", tasks, config, eval_tasks=held_out)
        trainer.train()
        lines = (Path(folder) / "meta" / "curves.jsonl").read_text().splitlines()
        curves = [json.loads(line) for line in lines]
        found = [("meta" if line["step"] else "base", line) for line in curves]
        del trainer
        if joint:
            found += joint_curves(config, f"{folder}/joint")
    about = {"bench": "meta", "seed": seed}
    names = ("batch_size", "response_length", "eval_prompts")
    rows = [
        about
        | {"kind": "run", "seconds": time.perf_counter() - started, "tasks": list(tasks)}
        | {"held_out": list(held_out), "episodes": config.total_episodes}
        | {name: SETTINGS[name] for name in names}
    ]
    for arm, line in found:
        for after, score in zip(line["after"], line["score"], strict=True):
            point = {"task": line["task"], "after": after, "score": round(score, 5)}
            rows.append(about | {"kind": "curve", "arm": arm} | point)
    return [begun | row for row in rows]


def one(seed: int, quick: bool, joint: bool) -> list[dict[str, Any]]:
    """`run` in a process of its own with one thread."""
    command = [sys.executable, __file__, "--one", f"--seeds={seed}", *["--quick"] * quick]
    command += ["--joint"] * joint
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept(rows: list[dict[str, Any]], only_print: bool) -> list[dict[str, Any]]:
    """Put a seed's rows into the results, unless they are only to be printed."""
    if not only_print:
        keep("meta", rows, ("seed",))
    return rows


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Meta-training on SmolLM2-135M.")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--joint", action="store_true", help="the third arm too")
    parser.add_argument("--quick", action="store_true", help="one meta step: does it run?")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, a thread each")
    parser.add_argument("--print", action="store_true", help="print rows, write nothing")
    parser.add_argument("--figure", action="store_true", help="only draw the figure")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = options()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if given.one:
        print(as_lines(run(seeds[0], given.quick, given.joint)), end="")
        return
    if not given.figure:
        # What a quick run finds is no result.
        only_print = given.print or given.quick
        with ThreadPoolExecutor(given.jobs) as pool:
            made = pool.map(
                lambda seed: kept(one(seed, given.quick, given.joint), only_print), seeds
            )
            rows = [row for part in made for row in part]
        if only_print:
            print(as_lines(rows), end="")
            return
    from meta_figure import draw

    draw()


if __name__ == "__main__":
    main()
