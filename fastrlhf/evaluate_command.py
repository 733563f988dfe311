"""`fastrlhf eval`: a policy beside its reference, on the same prompts with the same seeds.

Both answer every prompt once. Each reward judges both answers: the win rate is the share of prompts
on which the policy's scores higher, ties counting half (`comparison`), with its 95 % interval. Of
a run, the policy is its checkpoint and the reference what it began from; the prompts are those that
the run held out. The KL that the policy has spent is exact, in nats a sequence. Scores are the
rewards' own: neither the penalty of a missing ending nor any shaping is in them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .backbone import SharedBackbone
from .comparison import compare, mean_interval
from .config import PPOConfig
from .data import PromptSet, load_rows
from .errors import UserError
from .evaluation import score_all
from .kept_settings import run_config
from .loading import load_backbone
from .out_of_memory import MicrobatchBudget, sampled
from .pretrained import Pretrained, context_length, find_pretrained
from .rewards.functions import RewardScorer
from .rewards.shaping import weighted_sum
from .rollout.engines import make_engine
from .run_files import is_run, read_given, refuse_other_runs
from .run_policy import find_checkpoint, load_policy
from .run_prompts import held_out_again
from .text_figures import distinct

__all__ = ["Asked", "evaluate_command"]


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; None is the run's own."""

    policy: str  # a run's folder, or a model
    reference: str | None = None
    checkpoint: str | None = None
    dataset: str | None = None
    rewards: Sequence[str] = ()
    prompts: int | None = None
    seed: int | None = None
    response_length: int | None = None


@dataclass(frozen=True)
class Answers:
    """What one model said to the prompts."""

    completions: Sequence[str]
    scores: dict[str, list[float | None]]  # by reward
    kl: list[float] | None  # nats of each sequence; None without a reference
    entropy: float  # nats a token


def evaluate_command(asked: Asked, *, as_json: bool, samples: int) -> int:
    """Print how the policy does beside its reference.

    Args:
        samples: prompts whose answers are printed side by side.

    Raises:
        UserError: no such run, model, data set or reward.
    """
    config = settings(asked)
    asked, config = with_given(asked, config)
    scorers = judges(asked, config)
    rows = load_rows(asked.dataset or config.dataset)
    source = find_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    prompts = chosen_prompts(asked, config, rows, source)
    for scorer in scorers.values():
        scorer.probe(["A prompt"], [{k: v for k, v in rows[0].items() if k != "prompt"}])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ran = is_run(asked.policy)
    checkpoint = find_checkpoint(Path(asked.policy), asked.checkpoint) if ran else None
    say(f"{checkpoint or asked.policy} answers {len(prompts)} prompts")
    if checkpoint is not None:
        backbone = load_policy(source, checkpoint, config, device)
    else:
        backbone = plain_model(source, asked, config, device)
    policy = answers(backbone, source.tokenizer, scorers, prompts, config)
    del backbone
    base = None
    if ran or asked.reference is not None:
        say(f"{asked.reference or config.model} answers the same prompts")
        base = reference_answers(asked, source, scorers, prompts, config, device)
    report = result(policy, base, prompts, config.seed)
    report |= {"policy": str(checkpoint or asked.policy)}
    report |= {"reference": (asked.reference or config.model) if base else None}
    print(json.dumps(report) if as_json else told(report, samples))
    return 0


def judges(asked: Asked, config: PPOConfig) -> dict[str, RewardScorer]:
    """Those asked for, else the run's own, each by itself."""
    own = [config.reward] if isinstance(config.reward, str) else config.reward
    if asked.rewards:
        # The weights and bounds of a run are those of its own rewards.
        config = replace(config, reward_weights=None, reward_bounds=None)
    elif len(own) > 1:
        config = replace(config, reward_weights=None)
    return {name: RewardScorer(name, config) for name in asked.rewards or own}


def with_given(asked: Asked, config: PPOConfig) -> tuple[Asked, PPOConfig]:
    """The same, with what the run was given from Python in place of its settings.

    Raises:
        UserError: something that has no name, and nothing is asked for in its place.
    """
    given = read_given(asked.policy)
    model, train, held_out, reward = (
        given.get(name) for name in ("model", "train_dataset", "eval_dataset", "reward")
    )
    unnamed = "given from Python, so that its folder cannot name what to load"
    if model is True:
        raise UserError(
            f"the run in {asked.policy} trained a model given from Python; give one of its "
            "checkpoints as a model (`fastrlhf export`)"
        )
    if asked.dataset is None and True in (held_out, train if held_out is None else None):
        raise UserError(f"the run's prompts were {unnamed}; give --dataset")
    if not asked.rewards and reward is True:
        raise UserError(f"the run's reward was {unnamed}; give --reward")
    if isinstance(model, str):
        config = replace(config, model=model)
    if isinstance(train, str):
        config = replace(config, dataset=train)
    if reward not in (None, True):
        config = replace(config, reward=reward)
    if isinstance(held_out, str) and asked.dataset is None:
        asked = replace(asked, dataset=held_out)
    return asked, config


def say(text: str) -> None:
    print(f"fastrlhf: {text}", file=sys.stderr)


def settings(asked: Asked) -> PPOConfig:
    """The run's settings, or the defaults with the model that was named."""
    changes = {
        name: value
        for name in ("seed", "response_length")
        if (value := getattr(asked, name)) is not None
    }
    if is_run(asked.policy):
        refuse_other_runs(Path(asked.policy))
        if asked.reference is not None:
            raise UserError("a run is compared with what it began from; leave --reference out")
        return replace(run_config(Path(asked.policy)), **changes)
    if Path(asked.policy, "checkpoints").is_dir():
        raise UserError(f"{asked.policy} holds no metrics.jsonl: give a run's folder, or a model")
    if asked.checkpoint is not None:
        raise UserError("--checkpoint is for a run's folder; leave it out for a model")
    for name, given in (("dataset", asked.dataset), ("reward", asked.rewards)):
        if not given:
            raise UserError(f"a model says nothing of its {name}; give --{name}")
    return PPOConfig(model=asked.policy, **changes)


def chosen_prompts(
    asked: Asked, config: PPOConfig, rows: Sequence[Any], source: Pretrained
) -> PromptSet:
    """Prompts that the run was not trained on; of another data set, its first ones."""
    prompts = PromptSet.tokenize(
        rows,
        source.tokenizer,
        context=context_length(source.config),
        response_length=config.response_length,
    )
    given = read_given(asked.policy)
    own = is_run(asked.policy) and asked.dataset in (None, config.dataset)
    # Training held none of these prompts out: it had others.
    own = own and given.get("eval_dataset") is None and given.get("train_dataset") is not True
    if own:
        # As they were split for training, whatever --seed is now.
        trained = replace(run_config(Path(asked.policy)), dataset=config.dataset)
        prompts = held_out_again(Path(asked.policy), prompts, trained, say)
    if asked.prompts is None:
        return prompts
    if asked.prompts > len(prompts):
        held = "the run held out" if own else "the data set has"
        raise UserError(f"--prompts is {asked.prompts}, but {held} {len(prompts)}; lower it")
    return prompts.take(range(asked.prompts))


def plain_model(source: Pretrained, asked: Asked, config: PPOConfig, device: str) -> SharedBackbone:
    """A model as it is; with a reference its KL is measured too."""
    reference = None
    if asked.reference is not None:
        found = find_pretrained(asked.reference, trust_remote_code=config.trust_remote_code)
        if found.tokenizer.get_vocab() != source.tokenizer.get_vocab():
            raise UserError(
                f"{asked.reference} has other tokens than {asked.policy}, so that neither its "
                "answers nor the KL can be compared; give a --reference with the same tokenizer"
            )
        reference = found.load(dtype=torch.float32, device=device)
    return SharedBackbone.load(
        source,
        device=device,
        lora=None,
        train_layers="all",
        critic=None,
        reference=reference is not None,
        reference_model=reference,
    )


def reference_answers(
    asked: Asked,
    source: Pretrained,
    scorers: dict[str, RewardScorer],
    prompts: PromptSet,
    config: PPOConfig,
    device: str,
) -> Answers:
    if asked.reference is None:
        # Whatever a run trains begins as its reference.
        backbone = load_backbone(source, config, device)
    else:
        found = find_pretrained(asked.reference, trust_remote_code=config.trust_remote_code)
        backbone = plain_model(found, replace(asked, reference=None), config, device)
    return answers(backbone, source.tokenizer, scorers, prompts, config)


def answers(
    backbone: SharedBackbone,
    tokenizer: Any,
    scorers: dict[str, RewardScorer],
    prompts: PromptSet,
    config: PPOConfig,
) -> Answers:
    """One answer to every prompt, with the seed that every model here is given."""
    engine = make_engine(backbone, tokenizer, config)
    generator = torch.Generator(backbone.device).manual_seed(config.seed + 1_000_003)
    batch = prompts.batch(backbone.device)
    rollout = sampled(lambda: engine.generate(batch, generator), len(prompts), "lower --prompts")
    columns: dict[str, torch.Tensor] = {}
    for name, scorer in scorers.items():
        table = scorer.table(rollout)
        columns[name] = weighted_sum(table, scorer.weights)
        parts = zip(scorer.names, table.T, strict=True) if table.shape[1] > 1 else ()
        columns |= {f"{name}: {part}": column for part, column in parts}
    scores = {k: [None if math.isnan(x) else x for x in v.tolist()] for k, v in columns.items()}
    # The KL is exact where training itself took the sampler's word, and measured none.
    config = replace(config, old_logprobs="scored")
    experience = score_all(backbone, rollout, config, MicrobatchBudget(config))
    mask = experience.response_mask
    spent = None if experience.kl is None else (experience.kl * mask).sum(-1).tolist()
    return Answers(rollout.completions, scores, spent, float(experience.entropy[mask].mean()))


def result(policy: Answers, base: Answers | None, prompts: PromptSet, seed: int) -> dict[str, Any]:
    """All figures, as `--json` prints them."""
    rewards: dict[str, dict[str, Any]] = {}
    for name, scores in policy.scores.items():
        judged = [score for score in scores if score is not None]
        try:
            if base is not None:
                rewards[name] = asdict(compare(scores, base.scores[name], seed))
            else:
                alone = asdict(mean_interval(judged, seed))
                rewards[name] = {"prompts": len(judged), "policy": alone}
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"the reward {name!r} judged no prompt for both; give one that does"
            ) from error
    figures: dict[str, Any] = {
        "prompts": len(prompts),
        "kl": None if policy.kl is None else asdict(mean_interval(policy.kl, seed)),
        "entropy": policy.entropy,
        "distinct_2": distinct(policy.completions, 2),
        "rewards": rewards,
    }
    if base is not None:
        own = {"entropy": base.entropy, "distinct_2": distinct(base.completions, 2)}
        figures |= {f"reference_{name}": figure for name, figure in own.items()}
    figures["samples"] = [
        {
            "prompt": text,
            "policy": policy.completions[i],
            "reference": base.completions[i] if base else None,
            "scores": {
                name: {
                    "policy": scores[i],
                    "reference": base.scores[name][i] if base else None,
                }
                for name, scores in policy.scores.items()
            },
        }
        for i, text in enumerate(prompts.texts)
    ]
    return figures


def told(report: dict[str, Any], samples: int) -> str:
    """The figures for a reader."""

    def of(interval: dict[str, float], spec: str = "+.3f") -> str:
        value, low, high = (format(interval[key], spec) for key in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    against = f" against {report['reference']}" if report["reference"] else ""
    lines = [f"{report['policy']}{against}, {report['prompts']} prompts (95 % intervals)"]
    for name, figures in report["rewards"].items():
        lines += ["", name]
        if "win_rate" in figures:
            lines.append(f"  win rate    {of(figures['win_rate'], '.1%')}")
        for key in ("policy", "reference", "difference"):
            if key in figures:
                lines.append(f"  {key:<11} {of(figures[key])}")
    spent = "not measured" if report["kl"] is None else of(report["kl"], ".2f")
    lines += ["", f"KL spent      {spent} nats a sequence"]
    for key, title in (("entropy", "entropy"), ("distinct_2", "distinct-2")):
        before = f" (reference {report[f'reference_{key}']:.2f})" if report["reference"] else ""
        lines.append(f"{title:<13} {report[key]:.2f}{before}")
    for sample in report["samples"][:samples]:
        lines += ["", sample["prompt"]]
        for side in ("reference", "policy"):
            if sample[side] is not None:
                judged = [scores[side] for scores in sample["scores"].values()]
                marks = " ".join("n/a" if x is None else f"{x:+.2f}" for x in judged)
                lines.append(f"  {side:<9} {marks}  {' '.join(sample[side].split())}")
    return "\n".join(lines)
