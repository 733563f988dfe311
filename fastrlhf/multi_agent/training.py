"""Agents that learn from each other: a round is dialogues played, then each learner's own update.

Read `MultiAgentTrainer.round`. Each agent is an adapter on one backbone, the reference is the base,
and each has its own baseline. While one learns the others' adapters take no gradients.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from ..backbone import SharedBackbone
from ..callbacks import Callbacks, make_trackers
from ..config import checked_class
from ..data import PromptSet
from ..errors import UserError
from ..identity import identity
from ..loading import find_model, load_backbone
from ..metrics import PhaseTimer, RunFolder
from ..optim import make_optimizer, make_schedule
from ..out_of_memory import MicrobatchBudget
from ..plot import can_plot
from ..progress import Display
from ..roles import RESERVED
from ..run_keeper import RunKeeper
from ..run_state import RunState, Stateful
from ..skipped_steps import SkippedSteps
from ..step import Updater
from .config import MultiAgentConfig
from .game import Game, check_game, known_agent, rules_of
from .learner import Learner
from .matrix import WinRates, draw_win_rates, win_rates
from .players import Played, Players
from .pool import Pool
from .records import MultiAgentSummary, sample_of

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["MultiAgentTrainer"]

# No training draw has these.
HELD_OUT_SEED = 1_000_003


class MultiAgentTrainer:
    """Trains the agents of a game, which speak with each other in turns.

    Args:
        model: a name or path for `find_pretrained`, or a backbone with LoRA made before.
        game: the rules: see `Game`. `ReferenceGame` and `ProposerSolver` are shipped.
        args: the settings. Its `model` stands in for a model left out.
        processing_class: the tokenizer, if not the model's own.
        callbacks: called at a training's events; see `callbacks`.
        name: of the run, for its folder.
        started: `time.perf_counter()` at the process's start, to count its seconds from.

    Raises:
        UserError: a game that does not fit together, an agent that it does not have.
    """

    def __init__(
        self,
        model: str | SharedBackbone | None = None,
        game: Game | None = None,
        args: MultiAgentConfig | None = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        *,
        name: str = "multi-agent",
        started: float | None = None,
    ):
        started = time.perf_counter() if started is None else started
        checked: Any = checked_class(
            args or MultiAgentConfig(), MultiAgentConfig, "MultiAgentTrainer"
        )
        self.config: MultiAgentConfig = checked
        config = self.config
        if game is None:
            raise UserError("MultiAgentTrainer needs a game; pass ReferenceGame() or one of yours")
        self.game = check_game(game)
        self.learners = named_learners(config, self.game)
        self.display = Display(config.steps)
        self.timer = PhaseTimer(self.display.phase)
        self.folder = RunFolder(config.output_dir, name)
        self.folder.note_given(model, self.game.name, None, self.game.name)
        trackers = make_trackers(config, self.folder, name)
        with self.timer("load"):
            source, tokenizer = find_model(model or config.model, processing_class, config)
            torch.manual_seed(config.seed)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.backbone = (
                source
                if isinstance(source, SharedBackbone)
                else load_backbone(source, config, device)
            )
            begun = self.add_agents()
        self.configs = {
            agent: replace(config, response_length=self.game.turn_tokens[agent])
            for agent in self.game.agents
        }
        self.pool = Pool(self.backbone, self.game.agents, config, lambda: self.folder.path)
        self.players = Players(self.backbone, tokenizer, self.game, self.configs, self.pool)
        self.optimizer = make_optimizer(self.backbone.trainable(), config)
        # One step of the schedule for each learner's step.
        episodes = config.total_episodes * len(self.learners)
        self.schedule = make_schedule(self.optimizer, replace(config, total_episodes=episodes))
        self.generator = torch.Generator(self.backbone.device).manual_seed(config.seed)
        self.dealer = torch.Generator().manual_seed(config.seed)
        self.shuffler = torch.Generator().manual_seed(config.seed)
        given = {"model": self.backbone.model, "processing_class": tokenizer, "trainer": self}
        self.callbacks = Callbacks([*trackers, *callbacks], config, **given)
        self.held_out = self.game.deal(config.eval_prompts, self.seeded("cpu"), True)
        self.agents = self.make_learners(begun)
        self.keeper = self.make_keeper(tokenizer, name, started)

    def add_agents(self) -> list[str]:
        """Give every agent its adapter; those that the backbone had before."""
        begun = []
        for agent in self.game.agents:
            if agent in self.backbone.roles and agent not in RESERVED:
                begun.append(agent)
            else:
                self.backbone.add_policy(agent)
        critic = ["critic"] if self.config.critic else []
        self.backbone.train_roles(*self.learners, *critic)
        return begun

    def make_learners(self, begun: Sequence[str]) -> dict[str, Learner]:
        names = {p: name for name, p in self.backbone.named_parameters()}
        self.budget = MicrobatchBudget(self.config, self.display.say)
        self.skipped = SkippedSteps(self.config, self.display.say)
        updater = Updater(self.optimizer, self.schedule, self.config, names)
        return {
            agent: Learner(
                agent, self.backbone, self.configs[agent], updater=updater, budget=self.budget,
                skipped=self.skipped, timer=self.timer, shuffler=self.shuffler,
                begun=agent in begun,
            )
            for agent in self.learners
        }  # fmt: skip

    def make_keeper(self, tokenizer: Any, name: str, started: float) -> RunKeeper:
        generators = {"sampling": self.generator, "deals": self.dealer, "order": self.shuffler}
        others: dict[str, Stateful] = {"pool": self.pool, "microbatches": self.budget}
        others |= {"skipped steps": self.skipped}
        for agent, learner in self.agents.items():
            others |= {f"algorithm of {agent}": learner.state}
            others |= {f"monitor of {agent}": learner.monitor}
        run = RunState(self.backbone, self.optimizer, self.schedule, generators, others)
        texts = [f"{self.game.name} {i}" for i in range(len(self.held_out))]
        dealt = PromptSet([*self.held_out, rules_of(self.game)], texts, [], tokenizer.pad_token_id)
        known = identity(self.backbone, [dealt])
        keeper = RunKeeper(
            self.folder, run, self.config, self.display, self.timer, self.callbacks, known, name,
            started,
        )  # fmt: skip
        self.skipped.last_checkpoint = keeper.checkpoints.told
        return keeper

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> MultiAgentSummary:
        """Train for `total_episodes` dialogues; the run's folder keeps the rest.

        Args:
            resume_from_checkpoint: True to go on with the run in `output_dir`, from its newest
                whole checkpoint; or the folder of a run, or of one of its checkpoints.

        Raises:
            UserError: a folder that holds a run already, or none to go on with; a game whose turns
                or rewards cannot be, by agent and turn.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        config, every = self.config, self.config.eval_steps
        done = number = self.keeper.begin(resume_from_checkpoint)
        with self.display, self.keeper:
            self.callbacks("on_train_begin")
            if not done:
                self.pool.keep(0)
                self.evaluate("before training", 0)
            over = self.keeper.end.reason is not None
            for number in range(done + 1, done if over else config.steps + 1):
                self.callbacks.step_begin(number)
                line = self.round(number)
                self.folder.write_metrics(line)
                self.display.step(number, line)
                self.callbacks("on_step_end")
                self.callbacks("on_log", logs=line)
                asked = self.callbacks.control.should_evaluate
                due = asked or (every and number % every == 0)
                # The last round is evaluated when training has ended.
                if due and not self.ends(line) and number < config.steps:
                    self.evaluate(f"after round {number}", number)
                if number % config.snapshot_steps == 0:
                    self.pool.keep(number)
                ends = self.ends(line)
                self.keeper.step_done(number)
                if ends:
                    break
            self.pool.keep(number)
            self.keeper.training_done(number)
            after = self.evaluate("after training", number)
            # The matrix is large: what was learnt is kept before it.
            self.keeper.checkpoints.save_final()
            matrices = self.matrices()
            self.callbacks("on_train_end")
        return self.finish(after, number, matrices)

    def round(self, number: int) -> dict[str, Any]:
        """Dialogues, and what each learner makes of its own turns; the round's metrics."""
        config = self.config
        with self.timer("rollout"):
            starts = self.game.deal(config.batch_size, self.dealer, False)
            seats = self.pool.seats(len(starts), self.learners, self.dealer)
            played = self.players.play(starts, self.generator, seats)
        line: dict[str, Any] = {"step": number, "episode": number * config.batch_size}
        line |= self.round_figures(played)
        times = self.timer.take_step()
        lines: list[dict[str, Any]] = []
        for agent, learner in self.agents.items():
            if (turns := played.turns_of(agent)) is None:
                continue
            learnt = learner.learn(number, *turns)
            for key in [key for key in learnt if key.startswith("time/")]:
                times[key] = times.get(key, 0.0) + learnt.pop(key)
            lines.append(learnt)
            own = {k: v for k, v in learnt.items() if k not in ("step", "episode")}
            line |= {f"{agent}/{key}": value for key, value in own.items()}
        # The run as a whole: means over the agents that learnt.
        for key in ("objective/scores", "objective/entropy", "objective/kl", "policy/clipfrac"):
            found = [learnt[key] for learnt in lines if key in learnt]
            if found or key in ("objective/scores", "objective/entropy"):
                line[key] = fmean(found) if found else 0.0
        return line | times

    def ends(self, line: Mapping[str, Any]) -> bool:
        """Whether the run is to end after the round with the metrics ``line``."""
        kls = [line.get(f"{agent}/objective/kl", 0.0) for agent in self.agents]
        return self.keeper.end.decide(
            {"objective/kl": max(kls, default=0.0)},
            callback=self.callbacks.control.should_training_stop,
            monitor=any(learner.monitor.stops for learner in self.agents.values()),
        )

    def round_figures(self, played: Played) -> dict[str, float]:
        """How the dialogues went: among agents as they are, and of each against past selves."""
        now = [row for row, seat in enumerate(played.seats) if not seat]
        figures: dict[str, float] = {}
        if now:
            figures |= self.figures(played, now)
        for agent in self.learners:
            met = [row for row, seat in enumerate(played.seats) if seat and agent not in seat]
            if met and (earned := played.earned(agent, met)) is not None:
                figures[f"{agent}/reward_against_past"] = earned
        return figures

    def figures(self, played: Played, rows: Sequence[int]) -> dict[str, float]:
        """Mean reward of each agent's turns, and what the game says of the dialogues."""
        earned = {agent: played.earned(agent, rows) for agent in self.game.agents}
        figures = {f"{agent}/reward": r for agent, r in earned.items() if r is not None}
        own = self.game.figures([played.dialogues[row] for row in rows])
        return figures | {f"game/{key}": value for key, value in own.items()}

    def evaluate(self, when: str, step: int) -> dict[str, float]:
        """Play the held-out starts, with draws from the same seed, and write what came of it."""
        with self.timer("evaluate"):
            generator = self.seeded(self.backbone.device)
            played = self.players.play(self.held_out, generator, setting="eval_prompts")
        self.timer.take_step()
        rows = range(len(played.dialogues))
        figures = self.figures(played, rows)
        score = fmean(
            [figures[f"{a}/reward"] for a in self.learners if f"{a}/reward" in figures] or [0.0]
        )
        self.keeper.heed_signal(step)
        self.folder.append("evaluations.jsonl", {"step": step, "score": score} | figures)
        self.callbacks("on_evaluate", metrics=figures)
        for row in rows:
            self.folder.append("samples.jsonl", {"step": step} | sample_of(played, row))
        told = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
        self.display.say(f"Held-out starts {when}: {told}")
        for row in rows[: self.config.num_samples]:
            self.display.say(f"  {sample_of(played, row)['completion']}")
        return figures

    def matrices(self) -> list[WinRates]:
        """The win rates of past selves; of two agents one has what the other lacks."""
        agents = self.game.agents
        if not self.config.matrix_games or len(agents) < 2:
            return []
        found: list[WinRates] = []
        with self.timer("matrix"):
            for agent in agents[:1] if len(agents) == 2 else agents:
                made = win_rates(
                    self.players, agent, self.config.matrix_games, self.config.seed,
                    lambda: self.keeper.stop.signal is None,
                )  # fmt: skip
                if made is None:
                    # Whoever asked the run to stop does not wait for thousands of dialogues.
                    self.display.say("stopped before the win rates of past selves were played")
                    return []
                found.append(made)
        self.folder.write_text("win_rates.json", json.dumps([asdict(x) for x in found]) + "\n")
        if can_plot():
            draw_win_rates(found, self.folder.path / "win_rates.png", self.keeper.name)
        return found

    def finish(
        self, after: Mapping[str, float], steps: int, matrices: Sequence[WinRates]
    ) -> MultiAgentSummary:
        before = dict(self.folder.read("evaluations.jsonl")[0])
        for key in ("step", "score"):
            before.pop(key)
        seconds, phases = self.keeper.seconds, dict(self.timer.total)
        folder = str(self.folder.path)
        summary = MultiAgentSummary(before, after, steps, seconds, phases, folder, matrices)
        self.folder.write_text("summary.json", json.dumps(asdict(summary)) + "\n")
        self.display.say(f"\nthe run is in {folder}")
        return summary

    def seeded(self, device: torch.device | str) -> torch.Generator:
        """A fresh generator for what is held out."""
        return torch.Generator(device).manual_seed(self.config.seed + HELD_OUT_SEED)


def named_learners(config: MultiAgentConfig, game: Game) -> list[str]:
    """The agents that learn, in the game's order."""
    if config.learners == "all":
        return list(game.agents)
    named = [known_agent(game, agent, "learners") for agent in config.learners]
    return [agent for agent in game.agents if agent in named]
