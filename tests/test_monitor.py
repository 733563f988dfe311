"""Each sign shows on a rollout made to have it, and none on rollouts like the first ones."""

import json
import random
from itertools import pairwise

import pytest
import tiny
import torch

from fastrlhf import PPOConfig, PPOTrainer, UserError
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.configs import GRPOConfig
from fastrlhf.controllers import KLController
from fastrlhf.rewards.monitor import Finding, HackingMonitor, flat_share
from fastrlhf.rewards.warning_signs import SIGNS, WINDOW
from fastrlhf.types import Prompts, Rollout

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "dklmnrst"]
BATCH, LENGTH = 32, 20


def rollout(texts, ended=True) -> Rollout:
    """Words are tokens."""
    batch, longest = len(texts), max(len(text.split()) for text in texts)
    tokens = torch.zeros(batch, 1 + longest, dtype=torch.long)
    mask = torch.zeros(batch, 1 + longest, dtype=torch.bool)
    mask[:, 0] = True
    for row, text in enumerate(texts):
        ids = torch.tensor([hash(word) % 2**31 for word in text.split()])
        tokens[row, 1 : 1 + len(ids)], mask[row, 1 : 1 + len(ids)] = ids, True
    prompts = Prompts(["p"] * batch, tokens[:, :1], mask[:, :1], [{}] * batch)
    logprobs = torch.zeros(batch, longest)
    done = torch.full((batch,), ended) if isinstance(ended, bool) else torch.tensor(ended)
    return Rollout(prompts, texts, tokens, mask, mask[:, 1:], logprobs, done)


def sentences(draw: random.Random, length: int = LENGTH, words=WORDS) -> list[str]:
    lengths = [length + draw.randint(-3, 3) for _ in range(BATCH)]
    return [" ".join(draw.choices(words, k=max(1, n))) for n in lengths]


class Run:
    """A monitor and the rollouts that it is shown."""

    def __init__(self, config=None, **settings):
        self.told = []
        config = config or PPOConfig(kl_coef=0.05, **settings)
        self.monitor = HackingMonitor(config, settings.get("gold"), self.told.append)
        self.draw, self.step = random.Random(0), 0

    def healthy(self, count=WINDOW, score=0.0, kl=1.0):
        for _ in range(count):
            texts = sentences(self.draw)
            self.show(texts, [self.draw.gauss(score, 0.3) for _ in texts], kl=kl)
        return self

    def show(self, texts, scores=None, *, kl=1.0, ended=True, count=1):
        for _ in range(count):
            self.step += 1
            scores = [self.draw.gauss(1.0, 0.3) for _ in texts] if scores is None else scores
            line = {"step": self.step, "objective/kl": kl}
            made = rollout(texts, ended)
            self.line = self.monitor.observe(made, torch.tensor(scores), line)
        return self

    @property
    def signs(self):
        return {finding.sign for finding in self.monitor.found}


def test_nothing_is_found_on_rollouts_like_the_first():
    run = Run().healthy(40)
    assert run.monitor.findings == []
    assert run.line["monitor/signs"] == 0
    assert run.line["monitor/distinct_2"] > 0.95
    assert run.line["monitor/repetition"] < 0.02


def test_a_score_that_rises_is_not_a_sign_by_itself():
    assert Run().healthy().healthy(20, score=0.9, kl=6.0).signs == set()


def test_repetition_and_what_comes_with_it():
    run = Run().healthy(8).show(["funny " * 20] * BATCH, count=WINDOW)
    assert run.signs >= {"repetition", "diversity", "compression"}
    (finding,) = [x for x in run.monitor.found if x.sign == "repetition"]
    assert finding.example.startswith("funny funny") and len(finding.example) < 210
    assert "in the first rollouts" in finding.sentence and "%" in finding.sentence
    assert run.line["monitor/repetition"] == pytest.approx(1 - 1 / 19)


def ordinary(draw: random.Random, length: int) -> list[str]:
    """Words in the shares of Zipf's law, as those of a language are."""
    shares = [1 / (rank + 1) ** 1.1 for rank in range(3000)]
    texts = [draw.choices(range(3000), shares, k=length) for _ in range(BATCH)]
    return [" ".join(f"{WORDS[w % len(WORDS)]}{w}" for w in text) for text in texts]


@pytest.mark.parametrize("first", [20, 500])
def test_long_ordinary_text_is_no_sign(first):
    run = Run()
    for length in [first] * WINDOW + [500, 1000] * WINDOW:
        run.show(ordinary(run.draw, length), [run.draw.gauss(0, 0.3) for _ in range(BATCH)])
    assert run.signs == set()
    assert run.line["monitor/repetition"] < 0.05


def test_long_text_that_goes_round_is_one():
    run = Run()
    for _ in range(WINDOW):
        run.show(ordinary(run.draw, 500))
    for _ in range(WINDOW):
        run.show([f"{text} " * 40 for text in ordinary(run.draw, 12)])
    assert "repetition" in run.signs
    paragraphs = Run()
    for length, times in [(500, 1)] * WINDOW + [(100, 5)] * WINDOW:
        paragraphs.show([f"{text} " * times for text in ordinary(run.draw, length)])
    assert paragraphs.signs == {"compression"}


def test_completions_that_are_all_one_are_alike_and_repeat_nothing():
    run = Run().healthy().show([" ".join(WORDS[:20])] * BATCH, count=WINDOW)
    assert "diversity" in run.signs
    assert "repetition" not in run.signs


def test_a_run_that_begins_collapsed():
    assert Run().show(["funny " * 20] * BATCH, count=WINDOW).signs >= {"repetition", "diversity"}


@pytest.mark.parametrize("direction", [1, -1], ids=["longer", "shorter"])
def test_length(direction):
    run = Run().healthy()
    for _ in range(WINDOW):
        texts = sentences(run.draw, 34 if direction == 1 else 12)
        run.show(texts, [1 + direction * len(text.split()) / 40 for text in texts])
    assert "length" in run.signs
    # Longer texts whose score is not had by it are no sign.
    run = Run().healthy()
    for _ in range(WINDOW):
        texts = sentences(run.draw, 34 if direction == 1 else 12)
        run.show(texts, [run.draw.gauss(1, 0.3) for _ in texts])
    assert "length" not in run.signs


def test_completions_that_end_at_once():
    run = Run().healthy()
    for _ in range(WINDOW):
        run.show(sentences(run.draw, 4))
    assert "ending" in run.signs


def test_truncation():
    run = Run().healthy()
    for _ in range(WINDOW):
        run.show(sentences(run.draw), ended=[False] * 20 + [True] * 12)
    assert "truncation" in run.signs
    # Where no response can end, being cut off is no sign.
    run = Run(stop_token=None)
    for _ in range(2 * WINDOW):
        run.show(sentences(run.draw), ended=False)
    assert run.signs == set()
    assert "monitor/truncated" not in run.line


def test_all_cut_off_from_the_start_with_equal_scores():
    run = Run()
    for _ in range(WINDOW):
        run.show(sentences(run.draw), [0.0] * BATCH, ended=False)
    assert run.signs == {"truncation", "contrast"}


def test_what_is_only_told_neither_stops_nor_raises():
    run = Run(hacking="stop")
    assert run.monitor.stops is False
    run.monitor.found.append(Finding(4, "contrast", "", ""))
    assert not run.monitor.stops
    run.monitor.found.append(Finding(5, "repetition", "", ""))
    assert run.monitor.stops


def test_groups_without_contrast():
    run = Run(GRPOConfig(num_generations=8))
    run.healthy()
    assert run.line["monitor/zero_std"] == 0
    for _ in range(WINDOW):
        dull = [1.0] * 16 + [run.draw.gauss(1, 0.3) for _ in range(16)]
        run.show(sentences(run.draw), dull)
    assert run.line["monitor/zero_std"] == 0.5
    assert run.signs == {"contrast"}


def test_kl_that_buys_nothing():
    run = Run().healthy(WINDOW, kl=1.0).healthy(WINDOW, score=0.6, kl=5.0)
    assert run.signs == set()
    assert "kl" in run.healthy(WINDOW, score=0.6, kl=12.0).signs
    # Early in a run the KL comes before the score.
    early = Run().healthy(WINDOW, kl=0.5).healthy(WINDOW, kl=4.0)
    assert early.signs == set()
    paid = Run().healthy(WINDOW, kl=1.0).healthy(WINDOW, score=0.6, kl=5.0)
    assert paid.healthy(WINDOW, score=1.6, kl=12.0).signs == set()
    assert paid.line["monitor/score_per_nat"] == pytest.approx(1.6 / 12, rel=0.2)


def test_a_gold_judge_that_falls_while_the_score_rises():
    judged = []

    def gold(completions, **_):
        judged.append(len(completions))
        return [random.Random(text).gauss(0, 1) - 3 * ("zz" in text) for text in completions]

    run = Run(gold=None)
    run.monitor = HackingMonitor(run.monitor.config, gold)
    run.healthy(8, score=0.0)
    assert run.signs == set()
    for score in (0.0, 1.0):
        for _ in range(WINDOW):
            worse = [text + " zz" for text in sentences(run.draw)]
            run.show(worse, [run.draw.gauss(score, 0.3) for _ in worse])
        assert run.signs == ({"gold"} if score else set())
    assert "zz" in run.monitor.found[0].example
    assert judged == [BATCH] * run.step


def test_what_was_not_judged_does_not_count():
    run = Run()
    scores = [1.0] * 31 + [float("nan")]
    run.show([*sentences(run.draw)[:31], "funny " * 40], scores)
    assert run.line["monitor/length"] < 24
    nothing = rollout(["a b"] * BATCH)
    unjudged = torch.full((BATCH,), float("nan"))
    assert run.monitor.observe(nothing, unjudged, {"step": 2}) == {}


def test_a_sign_is_told_once():
    run = Run().healthy().show(["funny " * 20] * BATCH, count=10)
    assert [str(finding) for finding in run.told] == run.monitor.findings
    assert len(run.signs) == len(run.told)
    assert run.line["monitor/signs"] == len(run.monitor.showing) >= 3


def test_raise_kl_and_stop():
    config = PPOConfig(kl_coef=0.1, hacking="raise_kl")
    run, controller = Run(config), KLController(0.1)
    run.healthy()
    run.monitor.respond(controller)
    assert controller.coef == 0.1
    run.show(["funny " * 20] * BATCH, count=WINDOW)
    for times in (1, 2):
        run.monitor.respond(controller)
        assert controller.coef == pytest.approx(0.1 * 1.25**times)
    assert not run.monitor.stops
    run.healthy(WINDOW)
    run.monitor.respond(controller)
    assert controller.coef == pytest.approx(0.1 * 1.25**2), "the sign shows no more"
    run = Run(hacking="stop").healthy()
    assert not run.monitor.stops
    assert run.show(["funny " * 20] * BATCH, count=WINDOW).monitor.stops
    warns, watched = Run().show(["funny " * 20] * BATCH, count=WINDOW), KLController(0.1)
    warns.monitor.respond(watched)
    assert watched.coef == 0.1 and not warns.monitor.stops


@pytest.mark.parametrize("changes", [{"kl_coef": 0.0}, {"kl_controller": "adaptive"}])
def test_raise_kl_needs_a_coefficient_that_is_its_own(changes):
    with pytest.raises(UserError, match="raise_kl"):
        PPOConfig(hacking="raise_kl", **changes)


@pytest.mark.parametrize("stopped", [2, 6, 11])
def test_state_goes_through_json(stopped):
    def shown(run, steps):
        for _ in range(steps):
            bad = run.step >= 8
            run.show(["funny " * 20] * BATCH if bad else sentences(run.draw))
        return run

    whole, parts = shown(Run(), 14), shown(Run(), stopped)
    resumed = HackingMonitor(parts.monitor.config)
    resumed.load_state_dict(json.loads(json.dumps(parts.monitor.state_dict())))
    parts.monitor = resumed
    shown(parts, 14 - stopped)
    assert parts.line == whole.line
    assert parts.monitor.state_dict() == whole.monitor.state_dict()
    assert whole.monitor.found


def all_of_a(completions, **_):
    return [text.count("a") / 8 for text in completions]


@pytest.mark.parametrize("hacking", ["warn", "stop", "raise_kl"])
def test_a_run_is_watched(tmp_path, hacking):
    config = PPOConfig(
        output_dir=str(tmp_path / "run"), total_episodes=32 * 24, batch_size=32, num_mini_batches=2,
        num_ppo_epochs=2, response_length=8, stop_token=None, learning_rate=3e-2, lora_rank=8,
        train_layers=2, kl_coef=1e-3, eval_prompts=8, num_samples=0, hacking=hacking,
    )  # fmt: skip
    rows = [{"prompt": a + b} for a in "abcdefgh" for b in "ijklmnop"]
    torch.manual_seed(0)
    lora = LoraSettings(8, 32.0)
    backbone = SharedBackbone(tiny.model(), lora=lora, train_layers=2, critic="shared")
    trainer = PPOTrainer(backbone, all_of_a, config, rows, processing_class=tiny.tokenizer())
    summary = trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = [json.loads(x) for x in (tmp_path / "run/findings.jsonl").read_text().splitlines()]
    assert "repetition" in {finding["sign"] for finding in told}
    assert "aaaa" in next(x for x in told if x["sign"] == "repetition")["example"]
    assert lines[0]["monitor/repetition"] < 0.1
    assert (summary.steps < 24) == (hacking == "stop")
    if hacking == "stop":
        assert told[0]["step"] == summary.steps
        assert [line["monitor/signs"] > 0 for line in lines] == [False] * (len(lines) - 1) + [True]
    if hacking == "raise_kl":
        # The weight that a rollout was trained with; what it raises is the next one's.
        for line, later in pairwise(lines):
            raised = later["kl_coef"] / line["kl_coef"]
            assert raised == pytest.approx(1.25 if line["monitor/signs"] else 1)


def test_groups_whose_scores_are_equal():
    none = float("nan")
    scores = torch.tensor([1.0, 1.0, 2.0, 1.0, none, none, none, 3.0])
    assert flat_share(scores, 2) == pytest.approx(2 / 3)
    assert flat_share(scores, 1) == 0
    assert flat_share(torch.tensor([2.0, none, 2.0]), 1) == 1


def test_every_sign_is_tested_here():
    tested = {"gold", "repetition", "diversity", "compression", "length", "ending"}
    assert {sign.name for sign in SIGNS} == tested | {"truncation", "contrast", "kl"}
