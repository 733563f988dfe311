"""Folders as runs leave them, made without training."""

import json
from pathlib import Path


def make_run(folder: Path, steps: int, *, slope: float = 0.1, kl: bool = True, **extra) -> Path:
    """A run of ``steps`` rollouts of four episodes, evaluated before and after.

    Args:
        slope: what a rollout adds to the score.
        kl: whether there was a reference.
        extra: metrics of every line.
    """
    folder.mkdir(parents=True)
    metrics = []
    for step in range(1, steps + 1):
        line = {"step": step, "episode": 4 * step, "objective/scores": slope * step}
        line |= {"objective/entropy": 3.0, "policy/clipfrac": 0.1, "val/explained_variance": -9.0}
        line |= {"time/rollout": 1.0, "time/score": 0.5, "time/update": 2.0} | extra
        metrics.append(line | ({"objective/kl": 0.2 * (step - 1)} if kl else {}))
    held_out = [
        {"step": step, "score": slope * step, "kl": 0.2 * step if kl else None, "entropy": 3.0}
        for step in (0, steps)
    ]
    samples = [
        {"step": step, "prompt": prompt, "completion": f"<b>{step}</b>", "score": slope * step}
        for step in (0, steps)
        for prompt in ("The film", "It is")
    ]
    for name, lines in (("metrics", metrics), ("evaluations", held_out), ("samples", samples)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "config.yaml").write_text("algorithm: ppo\nbatch_size: 4\nmodel: tiny\n")
    return folder
