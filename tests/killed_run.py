"""Kill one run with SIGKILL ten times at random moments, resume it to its end; twin runs freely.

A process of its own, which computes nothing itself: it forks a child for each attempt, so that what
takes long to import is imported once. Prints as JSON where each kill hit.
"""

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import fastrlhf.checkpoint
import fastrlhf.run_state
from fastrlhf import PPOConfig, PPOTrainer
from fastrlhf.errors import UserError

PROMPTS = [{"prompt": a + b} for a in "abcdefgh" for b in "ijklmnop"]
KILLS = 10


def share_of_e(completions, **_):
    return [text.count("e") / 8 for text in completions]


def settings(path: Path, model: Path) -> PPOConfig:
    return PPOConfig(
        model=str(model), total_episodes=16 * 12, batch_size=16, num_mini_batches=2,
        num_ppo_epochs=2, response_length=8, learning_rate=1e-2, train_layers=2, lora_rank=64,
        kl_coef=0.02, kl_controller="adaptive", microbatch_tokens=80, eval_prompts=8, num_samples=0,
        eval_steps=3, save_best=True, save_steps=2, seed=5, output_dir=str(path),
    )  # fmt: skip


def slowly(save):
    """Writing takes long enough to be hit."""

    def save_file(tensors, path, *given, **options):
        save(tensors, path, *given, **options)
        time.sleep(0.05)
        # Half a file: what a kill in the middle of writing it leaves.
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        time.sleep(0.05)
        Path(path).write_bytes(whole)

    return save_file


def attempt(config: PPOConfig, resume: bool, ready: int) -> None:
    for module in (fastrlhf.checkpoint, fastrlhf.run_state):
        module.save_file = slowly(module.save_file)
    trainer = PPOTrainer(None, share_of_e, config, PROMPTS)
    os.write(ready, b".")
    trainer.train(resume_from_checkpoint=resume)


def fork(config: PPOConfig, resume: bool) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        attempt(config, resume, writing)
    except UserError as error:
        # It was killed before it had made its folder.
        if resume and "holds no run" in str(error):
            os._exit(3)
        traceback.print_exc()
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_to_the_end(config: PPOConfig, resume: bool) -> None:
    child, _ = fork(config, resume)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status


def until_writing(checkpoints: Path) -> None:
    end = time.perf_counter() + 10
    while time.perf_counter() < end and not list(checkpoints.glob(".step-*")):
        time.sleep(0.005)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = folder / "model"
    chance = random.Random(7)
    begun = time.perf_counter()
    run_to_the_end(settings(folder / "free", model), resume=False)
    whole = time.perf_counter() - begun
    config = settings(folder / "killed", model)
    checkpoints = folder / "killed" / "checkpoints"
    hits = []
    for number in range(KILLS):
        child, ready = fork(config, resume=(folder / "killed/config.yaml").exists())
        assert select.select([ready], [], [], 60)[0] and os.read(ready, 1), "the child is gone"
        if number % 2:
            until_writing(checkpoints)
            time.sleep(chance.uniform(0.0, 0.6))
        else:
            time.sleep(chance.uniform(0.0, whole / 4))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(ready)
        there = [p.name for p in checkpoints.glob("*")] if checkpoints.is_dir() else []
        hits.append({"killed": killed, "there": sorted(there)})
    run_to_the_end(config, resume=(folder / "killed/config.yaml").exists())
    print(json.dumps(hits))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
