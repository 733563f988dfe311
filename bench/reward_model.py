"""A reward model on the human ratings of movie reviews: how often it agrees with people, held out.

SmolLM2-135M with an adapter in its top layers, trained on the ratings of 8,498 snippets and judged
on all pairs of 2,105 others whose ratings differ by more than 0.5. One row an evaluation: the
learning curve, from the head alone (step 0) on. For comparison, in the same split: VADER.

    python bench/reward_model.py                  rewrites bench/results/reward_model.jsonl
    python bench/reward_model.py --print          only prints the rows
    python bench/reward_model.py --threads 1      torch's threads; default 2
    python bench/reward_model.py --states FILE    keeps the frozen layers' output in FILE, or takes
                                                  it from there: their time is then not in the rows
    python bench/reward_model.py --rows-of FOLDER the rows of a run that was broken off, from its
                                                  folder
    python bench/reward_model.py --output FOLDER  keeps the run and its reward model in FOLDER
    python bench/reward_model.py key=value …      settings in place of those below, to search
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import yaml
from results import write

from fastrlhf import RewardConfig, RewardTrainer
from fastrlhf.preferences import load_preferences
from fastrlhf.rewards.preference_loss import measure
from fastrlhf.rewards.texts import sentiment
from fastrlhf.text_states import TextStates

SETTINGS: dict[str, Any] = {
    "eval_rows": 2105,
    "train_layers": 4,
    "bf16": True,
    "num_train_epochs": 1,
    "eval_steps": 66,
    "learning_rate": 2e-4,
    "head_learning_rate": 2e-4,
}


def take_states(trainer: RewardTrainer, file: Path) -> bool:
    """Use the states in ``file``, or keep them there; whether they were there."""
    texts = [*trainer.train_set.tokens, *trainer.held_out.tokens]
    if not file.exists():
        trainer.make_states()
        states = trainer.states
        assert states.flat is not None
        parts = states.flat.split(states.lengths)
        torch.save({tuple(x): part.clone() for x, part in zip(texts, parts, strict=True)}, file)
        return False
    kept = torch.load(file)
    trainer.states = TextStates(
        trainer.backbone, texts, budget_mb=0, microbatch_tokens=trainer.config.microbatch_tokens
    )
    trainer.states.flat = torch.cat([kept[tuple(x)] for x in texts])
    trainer.states.kept = len(texts)
    return True


def vader_accuracy(trainer: RewardTrainer) -> float:
    """On the same held-out pairs."""
    text_of = {
        tuple(trainer.tokenizer(row["completion"])["input_ids"]): row["completion"]
        for row in load_preferences(trainer.config.dataset)
    }
    texts = [text_of[tuple(ids)] for ids in trainer.held_out.tokens]
    stats = measure(torch.tensor(sentiment(completions=texts)), trainer.held_out.pairs())
    return stats.correct / stats.pairs


def run(settings: dict[str, Any], states: Path | None, folder: Path) -> list[dict[str, Any]]:
    trainer = RewardTrainer(args=RewardConfig(output_dir=str(folder), **settings))
    taken = False
    if states is not None:
        taken = take_states(trainer, states)
        trainer.make_states = lambda: None  # type: ignore[method-assign]
    summary = trainer.train()
    rows = rows_of(folder, trainer, settings, taken)
    rows[-1] |= {"phase_seconds": {k: round(v, 1) for k, v in summary.phase_seconds.items()}}
    return rows


def rows_of(
    folder: Path, trainer: RewardTrainer, settings: dict[str, Any], taken: bool
) -> list[dict[str, Any]]:
    """The learning curve that a run left in its folder."""
    lines = [json.loads(x) for x in (folder / "evaluations.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["held_out/loss"])
    facts = {
        "bench": "reward_model",
        "model": trainer.config.model,
        "dataset": trainer.config.dataset,
        "train_texts": len(trainer.train_set),
        "held_out_texts": len(trainer.held_out),
        "held_out_pairs": sum(len(part.chosen) for part in trainer.held_out.pairs()),
        "settings": settings,
        "steps_planned": trainer.steps,
        "vader_accuracy": round(vader_accuracy(trainer), 4),
        "trunk_from_file": taken,
    }
    return [
        facts
        | {k: round(v, 4) for k, v in line.items() if not k.startswith("time/")}
        | {"kept": line is best}
        for line in lines
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--print", action="store_true", dest="only_print")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--states", type=Path)
    parser.add_argument("--rows-of", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pairs = (word.split("=", 1) for word in given.settings)
    settings = SETTINGS | {key: yaml.safe_load(value) for key, value in pairs}
    with tempfile.TemporaryDirectory() as folder:
        if given.rows_of is not None:
            trainer = RewardTrainer(args=RewardConfig(output_dir=f"{folder}/run", **settings))
            rows = rows_of(given.rows_of, trainer, settings, given.states is not None)
        else:
            rows = run(settings, given.states, given.output or Path(folder) / "run")
    for row in rows:
        print(json.dumps(row))
    if not given.only_print:
        write("reward_model", rows)
