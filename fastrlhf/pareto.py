"""The front between two rewards from two trainings: rewarded soups (Ramé et al. 2023).

One policy is trained for each reward, both from the same base. The policies between them are
adapters interpolated at weights 0, 1/(n-1), … 1 (interpolation.py), which costs no training. All
answer the same held-out prompts with the same seeds, and both rewards judge every answer. A point
is dominated where another is as good by both rewards and better by one.

Deviations from the paper: adapters are interpolated by the change of the base that they make, not
factor by factor; and nothing is said of the policy that training on the weighted sum would give.

The folder holds a run for each reward, which a second call goes on with where the first was broken
off, `points/` (each policy as an adapter in PEFT's format), pareto.json, pareto.png and
samples.jsonl.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .adapter_file import WEIGHTS
from .comparison import Interval, mean_interval
from .config import PPOConfig, from_mapping
from .configs import CONFIGS
from .data import PromptSet, load_rows
from .errors import UserError
from .evaluate_command import Answers, answers
from .interpolation import save_interpolated
from .kept_settings import check_settings_kept, parse
from .loading import tokenized_prompts
from .metrics import RunFolder
from .pareto_plot import draw_front
from .plot import can_plot
from .pretrained import Pretrained, find_pretrained
from .rewards.functions import RewardScorer
from .roles import POLICY_ADAPTER
from .run_files import is_run
from .run_policy import find_checkpoint, load_policy
from .run_prompts import told_prompts
from .text_figures import distinct
from .trainers import TRAINERS

__all__ = ["Front", "Point", "dominated", "pareto_front"]

POINT = re.compile("[0-9.]+-[0-9.]+")  # a folder in points/, by its weights


@dataclass(frozen=True)
class Point:
    """One policy, judged on the held-out prompts."""

    weights: tuple[float, float]  # of the policies trained for each reward; 0 and 0: the base
    scores: tuple[Interval, Interval]  # by reward
    kl: float | None  # to the base, exact, nats a sequence
    entropy: float  # nats a token
    distinct_2: float  # distinct word bigrams over word bigrams
    dominated: bool
    adapter: str | None  # its folder; None: the base


@dataclass(frozen=True)
class Front:
    """What can be had of two rewards."""

    rewards: tuple[str, str]
    points: tuple[Point, ...]  # from the first reward's policy to the second's
    base: Point  # before training
    prompts: int  # that each answered
    output: str
    seconds: float


def pareto_front(
    config: PPOConfig,
    rewards: Sequence[str],
    points: int = 5,
    output: str | Path = "runs/pareto",
    *,
    labels: Sequence[str] | None = None,
) -> Front:
    """Train for each of two rewards, interpolate, judge and draw.

    Args:
        config: the settings of both trainings; its `reward` and `output_dir` are not read.
        rewards: two of what `reward=` takes.
        points: policies on the front, its two ends among them.
        output: the folder. Runs there that were trained with these settings are gone on with.
        labels: what the picture calls the rewards. None: as they are given.

    Raises:
        UserError: whatever can be known to fail before training; a front of other rewards there,
            or runs of other settings or prompts.
    """
    started = time.perf_counter()
    if not all(isinstance(reward, str) for reward in rewards):
        raise UserError("rewards must be two texts of what `reward=` takes, each a reward by name")
    rewards = tuple(reward.strip() for reward in rewards)
    check_asked(config, rewards, points)
    output = Path(output)
    runs = list(zip(rewards, folders(rewards, output), strict=True))
    configs = [replace(config, reward=reward, output_dir=str(path)) for reward, path in runs]
    check_output(output, rewards)
    for ours in configs:
        check_kept(ours)
    scorers = {reward: RewardScorer(reward, config) for reward in rewards}
    source, prompts = held_out(config, scorers)
    for _, path in runs:
        check_prompts(path, prompts)
    for ours in configs:
        train(ours)
    say(f"{points + 1} policies answer {len(prompts)} prompts")
    ends = [find_checkpoint(path, "final") for _, path in runs]
    shares = [i / (points - 1) for i in range(points)]
    made = [
        save_interpolated(ends, (1 - x, x), output / "points" / f"{1 - x:.3g}-{x:.3g}")
        for x in shares
    ]
    base, told = judged(source, made, scorers, prompts, config)
    means = [[interval.value for interval in scores(x, config)] for x in (base, *told)]
    worse = dominated(means[1:])
    front = Front(
        (rewards[0], rewards[1]),
        tuple(
            point((1 - x, x), answer, config, is_worse, folder)
            for x, answer, is_worse, folder in zip(shares, told, worse, made, strict=True)
        ),
        point((0.0, 0.0), base, config, dominated(means)[0], None),
        len(prompts),
        str(output),
        time.perf_counter() - started,
    )
    keep(front, prompts, [base, *told], labels or rewards)
    return front


def dominated(scores: Sequence[Sequence[float]]) -> list[bool]:
    """Of each point, whether another has no score below its own and one above."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        pairs = list(zip(a, b, strict=True))
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    return [any(beats(other, own) for other in scores) for own in scores]


def check_asked(config: PPOConfig, rewards: Sequence[str], points: int) -> None:
    """Raise UserError for what no front can be made of."""
    if len(rewards) != 2:
        named = ", ".join(rewards) or "none"
        raise UserError(f"a front is between two rewards, not {len(rewards)} ({named}); give two")
    if rewards[0] == rewards[1]:
        raise UserError(f"both rewards are {rewards[0]!r}, which is no front; give another one")
    if points < 2:
        raise UserError(f"points is {points}, but a front has two ends; give 2 or more")
    if not config.use_peft:
        raise UserError("a front interpolates adapters, full training has none; set use_peft: true")
    for name in ("adapter", "reward_weights", "reward_bounds"):
        if getattr(config, name) is not None:
            why = "begins at the base" if name == "adapter" else "has one reward a training"
            raise UserError(f"a front {why}, so that {name} says nothing; leave {name} out")


def check_output(output: Path, rewards: Sequence[str]) -> None:
    """Raise UserError where the folder holds something else than the front of ``rewards``."""
    if is_run(output):
        raise UserError(
            f"{output} holds a run, whose files a front would take; give another --output"
        )
    if not (path := output / "pareto.json").is_file():
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["rewards"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no front; remove it, or give another --output") from error
    if kept != list(rewards):
        raise UserError(
            f"{output} holds the front between {' and '.join(kept)}; give another --output"
        )


def check_prompts(run: Path, prompts: PromptSet) -> None:
    """Raise UserError where the run in the folder has held out others: it has seen some of these.

    Nothing is said of a folder without a run.
    """
    if (told := told_prompts(run)) and told != list(prompts.texts):
        raise UserError(
            f"the data set has changed since the run in {run}, which held out other prompts; give "
            "it as it was, or another --output"
        )


def folders(rewards: Sequence[str], output: Path) -> list[Path]:
    """The folder of each reward's run."""
    names = [re.sub("[^A-Za-z0-9]+", "-", reward).strip("-")[-40:] for reward in rewards]
    if names[0] == names[1]:
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return [output / name for name in names]


def kept_config(ours: PPOConfig) -> PPOConfig | None:
    """The settings of the run that is in the folder already, if one is."""
    path = Path(str(ours.output_dir)) / "config.yaml"
    if not path.is_file():
        return None
    return from_mapping(parse(path.read_text(encoding="utf-8"), str(path)), type(ours))


def check_kept(ours: PPOConfig) -> None:
    """Raise UserError where the folder cannot be written or holds a run of other settings."""
    RunFolder(ours.output_dir, "pareto")
    kept = kept_config(ours)
    if kept is not None:
        check_settings_kept(f"the run in {ours.output_dir}", kept, ours)


def train(config: PPOConfig) -> None:
    """Train for one reward, unless it is done: go on where an earlier call was broken off."""
    path, kept = Path(str(config.output_dir)), kept_config(config)
    whole = (path / "summary.json").is_file() and (path / "checkpoints" / "final").is_dir()
    if kept is not None and whole and kept.total_episodes == config.total_episodes:
        say(f"{path} is trained")
        return
    say(f"training for {config.reward} in {path}")
    verb = next(verb for verb, kind in CONFIGS.items() if kind is type(config))
    TRAINERS[verb](args=config, name=path.name).train(resume_from_checkpoint=kept is not None)
    # A trainer refers to itself in cycles: its weights would stay beside the next one's.
    gc.collect()


def held_out(config: PPOConfig, scorers: dict[str, RewardScorer]) -> tuple[Pretrained, PromptSet]:
    """The model, and the prompts that neither training has seen; the rewards are called once."""
    rows = load_rows(config.dataset)
    for scorer in scorers.values():
        scorer.probe(["A prompt"], [{k: v for k, v in rows[0].items() if k != "prompt"}])
    source = find_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    return source, tokenized_prompts(source, source.tokenizer, rows, None, config)[1]


def judged(
    source: Pretrained,
    adapters: Sequence[Path],
    scorers: dict[str, RewardScorer],
    prompts: PromptSet,
    config: PPOConfig,
) -> tuple[Answers, list[Answers]]:
    """What the base and each policy say to the prompts; the base's weights are loaded once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_policy(source, adapters[0], config, device)

    def told() -> Answers:
        return answers(backbone, source.tokenizer, scorers, prompts, config)

    policy, backbone.roles["policy"] = backbone.roles["policy"], ()
    base = told()
    backbone.roles["policy"] = policy
    all_told = []
    for adapter in adapters:
        odd = backbone.adapters.fill(POLICY_ADAPTER, load_file(adapter / WEIGHTS))
        assert not odd, odd
        all_told.append(told())
    return base, all_told


def scores(told: Answers, config: PPOConfig) -> list[Interval]:
    """The mean of each reward."""
    means = []
    for reward, given in told.scores.items():
        known = [score for score in given if score is not None]
        if not known:
            raise UserError(f"the reward {reward!r} judged no held-out prompt; give one that does")
        means.append(mean_interval(known, config.seed))
    return means


def point(
    weights: tuple[float, float],
    told: Answers,
    config: PPOConfig,
    is_worse: bool,
    folder: Path | None,
) -> Point:
    first, second = scores(told, config)
    kl = None if told.kl is None else sum(told.kl) / len(told.kl)
    text = distinct(told.completions, 2)
    adapter = None if folder is None else str(folder)
    return Point(weights, (first, second), kl, told.entropy, text, is_worse, adapter)


def keep(front: Front, prompts: PromptSet, told: Sequence[Answers], labels: Sequence[str]) -> None:
    """Write the figures, the answers and the picture."""
    output = Path(front.output)
    text = json.dumps(asdict(front), indent=1) + "\n"
    RunFolder(front.output, "pareto").write_text("pareto.json", text)
    # Those of other --points are on no front any more.
    made = {Path(str(point.adapter)).name for point in front.points}
    for folder in (output / "points").iterdir():
        if POINT.fullmatch(folder.name) and folder.name not in made:
            shutil.rmtree(folder)
    with (output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for where, answer in zip([front.base, *front.points], told, strict=True):
            for i, prompt in enumerate(prompts.texts):
                judged_as = {name: given[i] for name, given in answer.scores.items()}
                line: dict[str, Any] = {"weights": where.weights, "prompt": prompt}
                line |= {"completion": answer.completions[i], "scores": judged_as}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if can_plot():
        draw_front(asdict(front), labels, output / "pareto.png")
    else:
        say("no plot: pip install matplotlib")
    say(f"the front is in {output}")


def say(text: str) -> None:
    print(f"fastrlhf: {text}", file=sys.stderr)
