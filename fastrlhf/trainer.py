"""The trainer as one straight line: generate, judge, score, shape, update. Read `PPOTrainer.step`.

The algorithm is a row of algorithms.py. Deviations from Schulman et al. 2017 and from TRL's PPO,
explained in docs/math.md:

1. The KL to the reference is exact, split between the next token's reward and the loss.
2. Policy, reference and critic are one backbone; its frozen layers run once a rollout.
3. The first epoch's microbatches are those that scoring used: its first ratios are exactly 1.
4. Advantages, where they are whitened, are so over the whole rollout.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrlhf_kernels import PolicyLossSpec

from .algorithms import ALGORITHMS
from .audit import audited
from .backbone import SharedBackbone
from .barren_rollouts import BarrenRollouts
from .callbacks import Callbacks, make_trackers
from .config import PPOConfig, checked_class
from .controllers import AlgorithmState
from .data import PromptSet, load_rows
from .evaluation import Evaluation, evaluate
from .experience import minibatch_losses, score
from .identity import identity
from .loading import find_model, load_backbone, tokenized_prompts, with_library_configs
from .losses import MicrobatchLoss, MinibatchLoss, policy_items
from .metrics import PhaseTimer, RunFolder, step_metrics
from .microbatches import Layout, Sequences, cut
from .optim import make_optimizer, make_schedule
from .out_of_memory import MicrobatchBudget
from .progress import Display
from .resume import kept_evaluation
from .rewards.functions import RewardFunction, RewardScorer
from .rewards.monitor import HackingMonitor
from .rollout.engines import make_engine
from .rollout.groups import GroupSampler
from .rollout.importance import weighed
from .run_keeper import RunKeeper
from .run_state import RunState, Stateful
from .selfcheck import check_experience, check_first_minibatch
from .skipped_steps import SkippedSteps
from .step import NonFiniteStep, Updater
from .summary import Summary, summarize
from .types import Experience

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["PPOTrainer"]


class PPOTrainer:
    """Trains a language model with PPO, or with the algorithm that its settings name.

    Args:
        model: a name or path for `find_pretrained`, or a backbone made before.
        reward_funcs: a reward function, its name, or a list (see `rewards.functions`).
        args: the settings. Its `model`, `dataset` and `reward` stand in for arguments left out.
        train_dataset: a name or path for `load_rows`, or rows with a `prompt`.
        eval_dataset: held-out prompts likewise. None: `args.eval_prompts` of the training data.
        processing_class: the tokenizer, if not the model's own.
        peft_config, quantization_config: PEFT's and bitsandbytes'; see `with_library_configs`.
        callbacks: called at a training's events; see `callbacks`.
        name: of the run, for its folder and plot. None: the algorithm's.
        started: `time.perf_counter()` at the process's start, to count its seconds from.

    Raises:
        UserError: whatever can be known to fail before training, the reward function called once.
    """

    config_class: ClassVar[type[PPOConfig]] = PPOConfig

    def __init__(
        self,
        model: str | SharedBackbone | None = None,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
        args: PPOConfig | None = None,
        train_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        *,
        peft_config: Any = None,
        quantization_config: Any = None,
        name: str | None = None,
        started: float | None = None,
    ):
        started = time.perf_counter() if started is None else started
        args = checked_class(args, self.config_class, type(self).__name__)
        self.config = config = with_library_configs(args, model, peft_config, quantization_config)
        self.algorithm = ALGORITHMS[config.algorithm]
        self.state = AlgorithmState.of(config)
        name = name or config.algorithm
        self.display = Display(config.steps)
        self.timer = PhaseTimer(self.display.phase)
        self.folder = RunFolder(config.output_dir, name)
        self.folder.note_given(model, train_dataset, eval_dataset, reward_funcs)
        trackers = make_trackers(config, self.folder, name)
        with self.timer("load"):
            reward = reward_funcs if reward_funcs is not None else config.reward
            self.reward = RewardScorer(reward, config)
            rows = load_rows(train_dataset if train_dataset is not None else config.dataset)
            eval_rows = None if eval_dataset is None else load_rows(eval_dataset)
            columns = [{k: v for k, v in rows[0].items() if k != "prompt"}]
            self.reward.probe(["A prompt"], columns)
            self.monitor = HackingMonitor.of_run(config, self.folder.append, self.display.say)
            self.monitor.probe(["A prompt"], columns)
            source, tokenizer = find_model(model or config.model, processing_class, config)
            self.train_prompts, self.held_out = tokenized_prompts(
                source, tokenizer, rows, eval_rows, config
            )
            # Weights come last: what could be wrong with the rest is known by now.
            if isinstance(source, SharedBackbone):
                # It need not be what the settings say: there is no plan of it.
                self.backbone, self.model_config = source, None
            else:
                # Adapters are drawn at random: the same seed gives the same run.
                torch.manual_seed(config.seed)
                device = "cuda" if torch.cuda.is_available() else "cpu"
                self.backbone = load_backbone(source, config, device)
                self.model_config = source.config
            self.reward.share(self.backbone, tokenizer, self.display.say)
        self.engine = make_engine(self.backbone, tokenizer, config)
        self.optimizer = make_optimizer(self.backbone.trainable(), config)
        self.schedule = make_schedule(self.optimizer, config)
        names = {p: name for name, p in self.backbone.named_parameters()}
        self.updater = Updater(self.optimizer, self.schedule, config, names)
        self.budget = MicrobatchBudget(config, self.display.say)
        self.scored = self.budget.tokens  # those of a microbatch of the latest scoring
        self.generator = torch.Generator(self.backbone.device).manual_seed(config.seed)
        self.shuffler = torch.Generator().manual_seed(config.seed)
        self.sampler = GroupSampler(
            self.engine, self.reward, self.train_prompts, self.shuffler, config
        )
        self.barren = BarrenRollouts(config, self.display.say)
        given = {"model": self.backbone.model, "processing_class": tokenizer, "trainer": self}
        self.callbacks = Callbacks([*trackers, *callbacks], config, **given)
        known = identity(self.backbone, (self.train_prompts, self.held_out))
        self.run = self.changing()
        self.keeper = RunKeeper(
            self.folder, self.run, config, self.display, self.timer, self.callbacks, known, name,
            started,
        )  # fmt: skip
        self.skipped = SkippedSteps(config, self.display.say, self.keeper.checkpoints.told)
        self.run.others["skipped steps"] = self.skipped

    def changing(self) -> RunState:
        """What changes in the run; `others` takes whatever else does."""
        generators = {"sampling": self.generator, "order": self.shuffler}
        others: dict[str, Stateful] = {"algorithm": self.state, "microbatches": self.budget}
        others |= {"reward": self.reward, "monitor": self.monitor}
        others |= {"engine": self.engine} if isinstance(self.engine, Stateful) else {}
        return RunState(self.backbone, self.optimizer, self.schedule, generators, others)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> Summary:
        """Train for `total_episodes` and return how it ended; the run's folder keeps the rest.

        Args:
            resume_from_checkpoint: True to go on with the run in `output_dir`, from its newest
                whole checkpoint; or the folder of a run, or of one of its checkpoints.

        Raises:
            UserError: a folder that holds a run already, or none to go on with; a full disk.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        done = number = self.keeper.begin(resume_from_checkpoint)
        with self.display, self.keeper:
            self.callbacks("on_train_begin")
            if not done:
                self.evaluate("before training", step=0)
            for number, prompts in enumerate(self.batches(done), start=done + 1):
                self.callbacks.step_begin(number)
                # A rollout and its trunk cache are gone before the next is generated.
                line = self.step(number, prompts)
                self.folder.write_metrics(line)
                self.display.step(number, line)
                self.callbacks("on_step_end")
                self.callbacks("on_log", logs=line)
                ended = self.after_step(number, line)
                self.keeper.step_done(number)
                if ended:
                    break
            self.keeper.training_done(number)
            after = kept_evaluation(self.folder, number) or self.evaluate("after training", number)
            self.callbacks("on_train_end")
            self.keeper.checkpoints.save_final()
        return self.finish(after, number)

    def after_step(self, number: int, line: Mapping[str, Any]) -> bool:
        """Evaluate where it is time to; whether training is to stop."""
        decide = partial(self.keeper.end.decide, line, monitor=self.monitor.stops)
        every, ended = self.config.eval_steps, decide(callback=self.callbacks.asked_to_stop)
        due = self.callbacks.control.should_evaluate or (every and number % every == 0)
        # The last step is evaluated when training has ended.
        if due and not ended and number < self.config.steps:
            self.evaluate(f"after step {number}", step=number, brief=True)
        return ended or decide(callback=self.callbacks.asked_to_stop)

    def step(self, number: int, prompts: PromptSet) -> dict[str, Any]:
        """One rollout and what is learnt from it; its metrics."""
        config = self.config
        with self.timer("rollout"):
            rollout, scores, sampling = self.sampler(prompts, self.generator)
            seen = self.barren.observe(rollout, scores)
        with self.timer("score"), audited(self.backbone, config):
            minibatches = self.deal(len(scores))
            experience = self.budget.run(
                partial(self.cut, rollout.sequences, minibatches),
                lambda layouts: score(self.backbone, rollout, layouts, config),
                lambda: self.updater.can_repeat,
            )
            self.scored = self.budget.tokens
            self.skipped.judged(scores)
            experience, known = experience.judged_by(scores)
            learnt = self.algorithm.advantages(known, experience, config, self.state)
            advantages = weighed(learnt.advantages, experience, rollout, config)
            experience = experience.with_advantages(advantages, learnt.returns)
            spec = self.algorithm.spec(config, float(learnt.scale), self.state)
            checks = check_experience(
                experience, rollout, dtype=self.dtype, engine=config.engine,
                untrained=number == 1 and self.backbone.starts_as_reference,
                temperature=config.temperature,
            )  # fmt: skip
        with self.timer("update"), audited(self.backbone, config):
            checks["lr"] = float(self.schedule.get_last_lr()[0])
            losses = self.epochs(experience, minibatches, spec)
            self.backbone.starts_as_reference = False
        line: dict[str, Any] = {"step": number, "episode": number * config.batch_size}
        line |= step_metrics(rollout, known, experience, losses, self.state.kl.coef)
        line |= self.state.metrics(config) | sampling | seen | checks
        line |= self.budget.metrics() | self.skipped.metrics() | self.reward.take_metrics()
        last = losses[-1].policy.stats if losses else None
        self.state.update(line.get("objective/kl"), config.batch_size, last)
        line |= self.monitor.observe(rollout, scores, line, self.state.kl)
        return line | self.timer.take_step()

    def epochs(
        self, experience: Experience, minibatches: list[Tensor], spec: PolicyLossSpec
    ) -> list[MinibatchLoss]:
        """Every optimizer step on a rollout, until `target_kl`; one summed loss a step.

        ``minibatches``: the first epoch's, those that scoring used.
        """
        losses: list[MinibatchLoss] = []
        far = self.config.target_kl
        for epoch in range(self.config.num_ppo_epochs):
            for rows in minibatches if epoch == 0 else self.deal(len(experience)):
                losses += self.update(experience, rows, spec, first=not losses)
                if far is not None and losses and losses[-1].policy.stats.approx_kl > far:
                    return losses
        return losses

    def update(
        self, experience: Experience, rows: Tensor, spec: PolicyLossSpec, *, first: bool
    ) -> list[MinibatchLoss]:
        """One optimizer step on the sequences ``rows``; the minibatch's summed loss.

        ``first``: the policy is still the one that was scored. Nothing happens, and nothing is
        returned, where no sequence of the minibatch was judged or the step is skipped.
        """
        mask = experience.response_mask[rows]
        num_items = int(mask.sum())
        if num_items == 0:
            return []
        items = (num_items, policy_items(spec, mask, self.config.response_length))
        steps = False

        def step(layouts: list[Layout]) -> tuple[list[MicrobatchLoss], Tensor]:
            given = (self.backbone, experience, layouts, spec, self.config)
            return self.updater.update(minibatch_losses(*given, *items), check)

        def check(parts: list[MicrobatchLoss]) -> None:
            nonlocal steps
            if first:
                # Smaller microbatches than scoring's are, like sampling, another forward.
                alike = self.config.old_logprobs == "scored" and self.budget.tokens == self.scored
                stats = MinibatchLoss.of(parts).policy.stats
                check_first_minibatch(
                    stats, self.dtype, alike=alike, temperature=self.config.temperature
                )
            steps = True

        try:
            parts, norm = self.budget.run(
                partial(self.cut, experience.sequences, [rows]),
                step,
                lambda: self.updater.can_repeat and not steps,
            )
        except NonFiniteStep as broken:
            self.skipped.skip(broken)
            return []
        self.skipped.taken()
        return [MinibatchLoss.of(parts)._replace(grad_norm=norm)]

    def batches(self, done: int = 0) -> Iterator[PromptSet]:
        """The batches of prompts after the first ``done``; none in a run that has ended."""
        size, config = self.config.batch_size // self.config.num_generations, self.config
        dealt = self.train_prompts.batches(size, config.steps, config.seed)
        return islice(dealt, config.steps if self.keeper.end.reason else done, None)

    def deal(self, batch: int) -> list[Tensor]:
        """Shuffle a batch of sequences into minibatches."""
        order = torch.randperm(batch, generator=self.shuffler)
        return list(order.chunk(self.config.num_mini_batches))

    def cut(self, sequences: Sequences, minibatches: list[Tensor], tokens: int) -> list[Layout]:
        """The microbatches of minibatches; first epoch and scoring have the same."""
        way = self.config.microbatching
        return [layout for rows in minibatches for layout in cut(sequences, rows, way, tokens)]

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.head.weight.dtype

    def evaluate(self, when: str, step: int, brief: bool = False) -> Evaluation:
        with self.timer("evaluate"):
            result = evaluate(
                self.engine, self.backbone, self.reward, self.held_out, self.config, self.budget
            )
        self.timer.take_step()
        self.keeper.evaluated(result, step)
        # Along the run a line will do: samples.jsonl has what was said.
        count = None if brief else self.config.num_samples
        self.display.evaluated(f"Held-out prompts {when}", result, count)
        return result

    def finish(self, after: Evaluation, steps: int) -> Summary:
        """Draw the plot and sum the run up; writes summary.json too."""
        return summarize(
            self.folder, self.config, after, steps=steps, seconds=self.keeper.seconds,
            title=f"{self.keeper.name}: {self.config.model}, reward {self.reward.name}",
            timer=self.timer, model_config=self.model_config, say=self.display.say,
            prompt_length=self.train_prompts.longest, device=self.backbone.device.type,
        )  # fmt: skip
