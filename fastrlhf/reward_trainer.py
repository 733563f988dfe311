"""Training a reward model: Bradley–Terry on preferences, on top of a trunk that is run once.

The reward role is an adapter in the top layers and a linear head, read at a text's last token. The
layers below never change, so their states of the whole data set are computed once and kept. A batch
scores each of its texts once, however many pairs it is in. Where a batch takes several microbatches
its scores are computed first, and the loss's gradient with respect to them then goes back through
one microbatch at a time: the pairs of a batch may lie across microbatches.

The head starts where it explains the preferences best with the adapter still at nothing: a convex
problem, solved on states that are computed once (Kumar et al. 2022: a head at random would distort
what the layers know). The weights with the lowest held-out loss are kept, normalised and saved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .backbone import SharedBackbone
from .comparisons import Comparison, RatedTexts, check_compared, epochs_of, rows_among, with_gap
from .errors import SelfCheckError, UserError
from .loading import load_backbone_with_reward
from .metrics import PhaseTimer, RunFolder
from .plot import can_plot
from .preferences import load_preferences, split_preferences
from .pretrained import checked_tokenizer, context_length, find_pretrained
from .progress import Display
from .reward_config import RewardConfig
from .reward_optimizer import make_optimizer
from .rewards.head_start import fit_head
from .rewards.model import RewardModel, normalize_head, save_reward_model
from .rewards.preference_loss import PreferenceStats, bradley_terry, draw_reliability, measure
from .stop_request import StopRequest
from .summary import RewardSummary
from .text_states import TextStates, by_length

__all__ = ["RewardTrainer"]

EVALUATIONS = "evaluations.jsonl"


class RewardTrainer:
    """Trains a reward model on preferences.

    Args:
        model: a name or path for `find_pretrained`, or a backbone with a reward role.
        args: the settings. Its `model` and `dataset` stand in for arguments left out.
        train_dataset: a name or path for `load_preferences`, or rows.
        eval_dataset: held-out preferences likewise. None: some of the training data.
        processing_class: the tokenizer, if not the model's own.
        name: of the run, for its folder.
        started: `time.perf_counter()` at the process's start, to count its seconds from.

    Raises:
        UserError: whatever can be known to fail before training, rows that prefer nothing by their
            number.
    """

    def __init__(
        self,
        model: str | SharedBackbone | None = None,
        args: RewardConfig | None = None,
        train_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        *,
        name: str = "reward",
        started: float | None = None,
    ):
        self.started = time.perf_counter() if started is None else started
        self.config = config = RewardConfig() if args is None else args
        if not isinstance(config, RewardConfig):
            raise UserError(f"RewardTrainer takes a RewardConfig, not a {type(config).__name__}")
        self.folder = RunFolder(config.output_dir, name)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.timer = PhaseTimer(lambda phase: None)
        with self.timer("load"):
            given = config.dataset if train_dataset is None else train_dataset
            # As the model's folder and the plot call it.
            self.dataset = given if isinstance(given, str) else "rows from Python"
            rows = load_preferences(given)
            eval_rows = None if eval_dataset is None else load_preferences(eval_dataset)
            trusts = config.trust_remote_code
            source = (
                model
                if isinstance(model, SharedBackbone)
                else find_pretrained(model or config.model, trust_remote_code=trusts)
            )
            tokenizer = processing_class or source.tokenizer
            if tokenizer is None:
                raise UserError("a backbone needs its tokenizer; pass processing_class")
            checked_tokenizer(tokenizer, "processing_class")
            own = source.decoder.config if isinstance(source, SharedBackbone) else source.config
            length = min(config.max_length, context_length(own))
            self.train_set, self.held_out = split_preferences(
                rows, eval_rows, tokenizer, config, length
            )
            # Weights come last: what could be wrong with the rest is known by now.
            if isinstance(source, SharedBackbone):
                self.backbone, self.base = source, source.model.config._name_or_path
            else:
                self.backbone = load_backbone_with_reward(source, config)
                self.base = source.source
        if self.backbone.reward_head is None:
            raise UserError("RewardTrainer needs a backbone with a reward role: reward=True")
        # The training rows that are evaluated, always the same.
        sample = self.train_set.sample(len(self.held_out), config.seed)
        self.train_sample = with_gap(sample, config.eval_rating_gap)
        check_compared(self.held_out, self.train_sample, config.eval_rating_gap)
        self.backbone.train_roles("reward")
        # transformers' classifiers have no bias, and differences of scores do not tell it.
        self.backbone.reward_head.linear.bias.requires_grad_(False)
        self.tokenizer = tokenizer
        self.steps = config.num_train_epochs * self.train_set.num_batches(config.batch_size)
        self.display = Display(self.steps)
        self.timer.started = self.display.phase
        self.stop = StopRequest()
        self.optimizer, self.schedule = make_optimizer(self.backbone, config, self.steps)

    def train(self) -> RewardSummary:
        """Train, keep the best weights, normalise them and save them.

        Raises:
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM, once the step under way is done; the
                best weights so far were saved.
        """
        config = self.config
        with self.folder.lock, self.display:
            self.folder.make()
            self.folder.write_text("config.yaml", config.to_yaml())
            with self.timer("trunk"):
                self.make_states()
            if config.head_start:
                with self.timer("head"):
                    self.start_head()
            self.timer.take_step()
            self.keep(self.evaluate(0, 0.0))
            try:
                with self.stop:
                    number, stopped = self.learn()
                    # One that came in the last evaluation.
                    self.stop.leave_if_asked(f"after step {number}")
            except BaseException:
                # A signal, or a gradient that is not finite: the best so far is not lost.
                self.restore(self.kept)
                self.display.say(
                    f"the best weights so far (step {self.best['step']:.0f}, not normalised) are "
                    f"in {self.save(normalized=False)}; this training cannot be gone on with"
                )
                raise
            self.restore(self.kept)
        return self.finish(number, stopped)

    def learn(self) -> tuple[int, str | None]:
        """All steps; how many there were, and why they ended early."""
        number, evaluated, epoch, every = 0, 0, 0.0, self.config.eval_steps
        for number, (batch, epoch, ends) in enumerate(self.dealt(), start=1):
            self.step(number, epoch, batch)
            if not (number % every if every else not ends):
                evaluated = number
                if stopped := self.judge(number, epoch):
                    return number, stopped
            self.stop.leave_if_asked(f"after step {number}")
        # Which step is the last one is known when no batch is left.
        return number, None if evaluated == number else self.judge(number, epoch)

    def dealt(self) -> Iterator[tuple[Comparison, float, bool]]:
        config = self.config
        return epochs_of(self.train_set, config.num_train_epochs, config.batch_size, self.generator)

    def judge(self, number: int, epoch: float) -> str | None:
        """Evaluate, keep what is better than before; why training is to stop."""
        found = self.evaluate(number, epoch)
        self.worse += 1
        if found["held_out/loss"] < self.best["held_out/loss"]:
            self.keep(found)
        if stopped := self.reason_to_stop(found, self.worse):
            self.display.say(f"stopped: {stopped}")
        return stopped

    def keep(self, found: dict[str, float]) -> None:
        self.best, self.kept, self.worse = found, copies(self.backbone.trainable()), 0

    def make_states(self) -> None:
        """The trunk's states of all texts, training and held out."""
        config = self.config
        every = [*self.train_set.tokens, *self.held_out.tokens]
        self.display.say(f"running the frozen layers once for {len(every)} texts")
        self.states = TextStates(
            self.backbone,
            every,
            budget_mb=config.trunk_cache_mb,
            microbatch_tokens=config.microbatch_tokens,
        )

    def start_head(self) -> None:
        """The head that explains the training preferences best while the adapter does nothing."""
        head = self.backbone.reward_head
        assert head is not None
        states = self.states.all_last(range(len(self.train_set.tokens)))
        with torch.no_grad():
            head.linear.weight.copy_(fit_head(states, self.train_set, self.config.seed))

    def step(self, number: int, epoch: float, batch: Comparison) -> None:
        """One optimizer step on a batch of pairs."""
        config = self.config
        with self.timer("update"):
            self.optimizer.zero_grad(set_to_none=True)
            scores, loss = self.backward(batch)
            norm = clip_grad_norm_(self.backbone.trainable(), config.max_grad_norm)
            if not norm.isfinite():
                raise SelfCheckError("the gradient is not finite; lower learning_rate")
            lr = float(self.schedule.get_last_lr()[0])
            self.optimizer.step()
            self.schedule.step()
        stats = PreferenceStats()
        stats.add(scores[batch.chosen], scores[batch.rejected])
        line: dict[str, float] = {"step": number, "epoch": round(epoch, 4)}
        line |= {"loss/reward": float(loss), "grad_norm": float(norm), "lr": lr}
        line |= {"pairs": stats.pairs, "texts": len(batch.texts)} | stats.metrics("train")
        self.folder.write_metrics(line | self.timer.take_step())
        figures = f"loss {float(loss):.3f}"
        self.display.progress.update(self.display.task, completed=number, figures=figures)

    def backward(self, batch: Comparison) -> tuple[Tensor, Tensor]:
        """Gradients of a batch's loss; its scores, [m], and the loss, [], both detached."""
        texts: list[int] = batch.texts.tolist()
        place = {text: i for i, text in enumerate(texts)}
        parts = list(by_length(self.states.lengths, texts, self.config.microbatch_tokens))
        # Where each microbatch's texts are in the batch.
        slots = [torch.tensor([place[text] for text in part]) for part in parts]
        one = len(parts) == 1
        with torch.set_grad_enabled(one):
            found = [self.states.scores(part) for part in parts]
            joined = torch.cat(found)[torch.cat(slots).argsort()]
        if not one:
            joined.requires_grad_()
        loss = self.loss(joined, batch)
        if one:
            loss.backward()
            return joined.detach(), loss.detach()
        (gradient,) = torch.autograd.grad(loss, joined)
        for part, own in zip(parts, slots, strict=True):
            (self.states.scores(part) * gradient[own]).sum().backward()
        return joined.detach(), loss.detach()

    def loss(self, scores: Tensor, batch: Comparison) -> Tensor:
        rated = isinstance(self.train_set, RatedTexts)
        margin = batch.margin * (self.config.rating_margin if rated else 1.0)
        return bradley_terry(
            scores[batch.chosen],
            scores[batch.rejected],
            margin.to(scores.device),
            self.config.center_rewards_coefficient,
        )

    def evaluate(self, number: int, epoch: float) -> dict[str, float]:
        """Held-out pairs, and pairs of as many training rows: the difference is the overfitting."""
        with self.timer("evaluate"):
            start = len(self.train_set.tokens)
            scores = self.states.all_scores(range(start, len(self.states.tokens)))
            self.held_out_stats = measure(scores, self.held_out.pairs())
            trained = self.states.all_scores(rows_among(self.train_sample, self.train_set))
            train_stats = measure(trained, self.train_sample.pairs())
        line = {"step": number, "epoch": round(epoch, 4)}
        line |= self.held_out_stats.metrics("held_out") | train_stats.metrics("train")
        line["gap"] = line["train/accuracy"] - line["held_out/accuracy"]
        self.folder.append(EVALUATIONS, line | self.timer.take_step())
        self.display.say(
            f"step {number}/{self.steps} · held-out accuracy {line['held_out/accuracy']:.3f} · "
            f"train {line['train/accuracy']:.3f} · gap {line['gap']:+.3f} · held-out loss "
            f"{line['held_out/loss']:.3f}"
        )
        return line

    def reason_to_stop(self, found: Mapping[str, float], worse: int) -> str | None:
        config = self.config
        if config.max_gap is not None and found["gap"] > config.max_gap:
            return f"the train/held-out gap {found['gap']:.3f} exceeds max_gap ({config.max_gap})"
        patience = config.early_stopping_patience
        if patience is not None and worse >= patience:
            return f"the held-out loss has not fallen for {worse} evaluations"
        return None

    @torch.no_grad()
    def restore(self, kept: list[Tensor]) -> None:
        for parameter, value in zip(self.backbone.trainable(), kept, strict=True):
            parameter.copy_(value)

    def save(self, *, normalized: bool) -> Path:
        """Write the reward model as it is to the run's folder; returns where."""
        facts = self.best | {"dataset": self.dataset, "normalized": normalized}
        facts |= {"trust_remote_code": self.config.trust_remote_code}
        return save_reward_model(self.backbone, self.folder.path / "model", self.base, facts)

    def finish(self, steps: int, stopped: str | None) -> RewardSummary:
        """Save what is kept, normalised; draw how sure it may be."""
        best = self.best
        # What follows can fail.
        folder = self.save(normalized=False)
        with self.timer("evaluate"):
            start = len(self.train_set.tokens)
            everything = self.states.all_scores()
            stats = measure(everything[start:], self.held_out.pairs())
        if self.config.normalize:
            normalize_head(self.backbone, everything[:start])
            self.save(normalized=True)
        if can_plot():
            title = f"Reward model on {Path(self.dataset).stem}"
            draw_reliability(stats, self.folder.path / "calibration.png", title)
        summary = RewardSummary(
            accuracy=best["held_out/accuracy"],
            train_accuracy=best["train/accuracy"],
            gap=best["gap"],
            margin=best["held_out/margin"],
            calibration_error=best["held_out/calibration_error"],
            loss=best["held_out/loss"],
            steps=steps,
            best_step=int(best["step"]),
            stopped=stopped,
            seconds=time.perf_counter() - self.started,
            folder=str(folder),
            phase_seconds=dict(self.timer.total),
        )
        self.folder.write_text("summary.json", json.dumps(asdict(summary)) + "\n")
        self.display.say(f"\nthe reward model is in {folder}: reward={folder}")
        return summary

    def reward_model(self) -> RewardModel:
        """The trained model as a reward function."""
        return RewardModel(self.backbone, self.tokenizer)


def copies(parameters):
    return [p.detach().clone() for p in parameters]
