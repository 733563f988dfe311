"""Agents that learn from each other, on SmolLM2-135M: a cooperative and a competitive game.

cooperative   the reference game: a speaker hints at one of several words, a listener picks it.
  pair            both learn
  listener alone  the speaker stays what it was; as many dialogues, the same settings
  The untrained pair is both arms' step 0. Judged on words that training never shows.

competitive   a proposer poses sums, a solver has tries at them.
  pool            half of the dialogues are against past selves
  no pool         all are against the other as it is now
  The untrained solver is both arms' step 0. Judged by an exam of sums that training never shows,
  and by a tournament: the untrained solver and both arms' last ones answer the same sums of every
  proposer that either arm has kept.

    python bench/multi_agent.py [--games cooperative,competitive] [--seeds 1,2] [--quick] [--print]
    python bench/multi_agent.py --figure     only draws docs/multi_agent.png and the page's table

Puts each seed's rows into bench/results/multi_agent.jsonl in the place of those that it had (with
--print: only prints; --quick: two rounds, only to see that it runs) and draws the figure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from results import as_lines, keep, stamp

Rows = list[dict[str, Any]]
SETTINGS: dict[str, Any] = dict(
    model="smollm2-135m",
    batch_size=32,
    lr_scheduler_type="constant",
    warmup_steps=2,
    train_layers=6,
    lora_rank=16,
    microbatch_tokens=1024,
    num_samples=0,
    save_steps=None,
)
GAMES: dict[str, dict[str, Any]] = {
    "cooperative": dict(
        rounds=40, batch_size=48, learning_rate=2e-3, kl_coef=0.03, pool_share=0.0,
        snapshot_steps=40, eval_prompts=256, eval_steps=20,
    ),
    "competitive": dict(
        rounds=22, learning_rate=1.5e-3, kl_coef=0.1, snapshot_steps=8,
        eval_prompts=16, eval_steps=11,
    ),
}  # fmt: skip
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "cooperative": {
        "pair": dict(matrix_games=0),
        "listener alone": dict(matrix_games=0, learners=["listener"]),
    },
    "competitive": {
        "pool": dict(pool_share=0.5, matrix_games=12),
        "no pool": dict(pool_share=0.0, matrix_games=12),
    },
}
SHOWN = 8  # dialogues of the first and the last evaluation that are kept
EXAM, TOURNAMENT = 48, 16  # sums in the exam; sums of each proposer in the tournament


def game_of(kind: str) -> Any:
    from fastrlhf.multi_agent import ProposerSolver, ReferenceGame

    return ReferenceGame() if kind == "cooperative" else ProposerSolver(largest=9)


def run(kind: str, seed: int, quick: bool) -> Rows:
    """Train all arms of a game on one seed; its rows."""
    import torch

    torch.set_num_threads(1)
    trainers, rows = {}, []
    for arm, changes in ARMS[kind].items():
        made, trained = train(kind, arm, seed, changes, quick)
        trainers[arm] = trained
        rows += made
    if kind == "competitive":
        begun = time.perf_counter()
        found = tournament(trainers, seed)
        rows += [row | {"seconds": time.perf_counter() - begun} for row in found]
    return [stamp() | {"bench": "multi_agent", "game": kind, "seed": seed} | row for row in rows]


def train(kind: str, arm: str, seed: int, changes: dict[str, Any], quick: bool) -> tuple[Rows, Any]:
    """One arm; its rows and its trainer."""
    from transformers import TrainerCallback

    from fastrlhf import MultiAgentConfig, MultiAgentTrainer

    started, rows, game = time.perf_counter(), [], game_of(kind)
    settings = SETTINGS | GAMES[kind] | changes | {"seed": seed}
    rounds = settings.pop("rounds")
    if quick:
        rounds, settings["eval_prompts"], settings["matrix_games"] = 2, 8, 2
    settings["total_episodes"] = rounds * settings["batch_size"]

    class Exam(TrainerCallback):
        """At every evaluation the solver is examined."""

        def on_evaluate(self, args, state, control, **given):
            trainer = given["trainer"]
            if kind == "competitive":
                starts = game.exam(8 if quick else EXAM, seed)
                played = trainer.players.play(starts, trainer.seeded("cpu"))
                solved = game.figures(played.dialogues)["solved"]
                rows.append({"kind": "exam", "step": state.global_step, "solved": solved})

    with tempfile.TemporaryDirectory() as folder:
        config = MultiAgentConfig(output_dir=f"{folder}/run", **settings)
        trainer = MultiAgentTrainer(None, game, config, callbacks=[Exam], name=arm)
        summary = trainer.train()

        def lines(name: str) -> Rows:
            text = (Path(folder) / "run" / name).read_text()
            return [json.loads(line) for line in text.splitlines()]

        for line in lines("evaluations.jsonl"):
            rows.append({"kind": "evaluation"} | line)
        for line in lines("metrics.jsonl"):
            kept = {k: round(v, 5) for k, v in line.items() if wanted(k) and v is not None}
            rows.append({"kind": "round", "step": line["step"]} | kept)
        last = max(line["step"] for line in lines("samples.jsonl"))
        for step in (0, last):
            for line in [x for x in lines("samples.jsonl") if x["step"] == step][:SHOWN]:
                kept = {k: line[k] for k in ("step", "prompt", "completion", "score")}
                rows.append({"kind": "sample"} | kept)
    for found in summary.matrices:
        rows.append({"kind": "matrix", "steps": list(found.steps), "games": found.games}
                    | {"agent": found.agent, "rates": found.rates})  # fmt: skip
    seconds = time.perf_counter() - started
    rows.append({"kind": "run", "seconds": seconds, "phases": dict(trainer.timer.total)} | changes)
    return [{"arm": arm} | row for row in rows], trainer


def wanted(key: str) -> bool:
    """Whether a figure of a round is kept in the rows."""
    ends = ("/reward", "/reward_against_past", "/objective/kl", "/objective/entropy", "/baseline")
    return key.startswith("game/") or key.endswith(ends)


def tournament(trainers: dict[str, Any], seed: int) -> Rows:
    """Three solvers answer the same sums of every kept proposer; a row for each pair."""
    import torch

    home = trainers["pool"]
    game, kept = home.game, home.pool.kept
    # The other arm's past selves get numbers of their own.
    other, shift = trainers["no pool"].pool.kept, 1000
    proposers = {step: ("pool", step) for step in kept}
    proposers |= {shift + step: ("no pool", step) for step in other if step}
    last = max(kept)
    solvers = {0: "untrained", last: "pool", shift + last: "no pool"}
    for step, selves in other.items():
        kept[shift + step] = selves
    starts = game.deal(TOURNAMENT, torch.Generator().manual_seed(seed), True)
    rows = []
    for solver, name in solvers.items():
        seats = [{"proposer": step, "solver": solver} for step in proposers for _ in starts]
        # The same draws for every solver: it is asked the same sums.
        generator = torch.Generator().manual_seed(seed)
        played = home.players.play([*starts] * len(proposers), generator, seats)
        for place, (arm, step) in enumerate(proposers.values()):
            own = played.dialogues[place * len(starts) : (place + 1) * len(starts)]
            about = {"arm": name, "solver": name, "proposer": arm, "step": step}
            rows.append({"kind": "tournament", "solved": None} | about | game.figures(own))
    return rows


def one(kind: str, seed: int, quick: bool) -> Rows:
    """`run` in a process of its own with one thread."""
    command = [sys.executable, __file__, "--one", f"--games={kind}", f"--seeds={seed}"]
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def told(rows: Rows) -> str:
    """A seed's end, to read while the next one runs."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        seconds = [row["seconds"] for row in own if row["kind"] == "run"]
        kinds = (("evaluation", "game/success"), ("exam", "solved"), ("tournament", "solved"))
        for kind, field in kinds:
            found = [r[field] for r in own if r["kind"] == kind and r.get(field) is not None]
            if found:
                shown = " ".join(f"{x:.2f}" for x in found)
                lines.append(f"{arm}: {kind} {shown} (mean {fmean(found):.3f}; {seconds} s)")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Agents that learn from each other.")
    parser.add_argument("--games", default=",".join(GAMES))
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--quick", action="store_true", help="two rounds; writes nothing")
    parser.add_argument("--print", action="store_true", help="print rows, write nothing")
    parser.add_argument("--figure", action="store_true", help="only draw the figure")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = options()
    if not given.figure:
        pairs = [(kind, int(s)) for s in given.seeds.split(",") for kind in given.games.split(",")]
        if given.one:
            print(as_lines(run(*pairs[0], given.quick)), end="")
            return
        for kind, seed in pairs:
            rows = one(kind, seed, given.quick)
            print(f"{kind}, seed {seed}\n{told(rows)}", file=sys.stderr, flush=True)
            if given.print or given.quick:
                print(as_lines(rows), end="")
            else:
                keep("multi_agent", rows, ("game", "seed"))
        if given.print or given.quick:
            return
    from multi_agent_figure import draw

    draw()


if __name__ == "__main__":
    main()
