"""Hierarchical training: a policy over response modes above one over tokens, on one backbone.

For every completion the high level picks a mode from the prompt alone (`mode_policy`); the mode's
instruction becomes part of the prompt (`modes`), and the low level writes the response. Both levels
learn from the same rollout:

    high  PPO on `score - expected score of the prompt`, over modes
    low   the algorithm's own update over tokens, with prompt and mode as its context; the critic
          reads the same context, so a token is not credited for the mode that was drawn

Modes are options (Sutton, Precup and Singh 1999) with deviations: an option lasts for one whole
response, so that it needs no termination and the high level's return is the score undiscounted;
every option can start anywhere; the options' policies are one, told apart by their instruction. The
KL to the reference, which is given the same instruction, is the low level's cost alone.

Everything else is PPOTrainer's: the engine is wrapped by one that picks modes, in training and in
evaluation alike, and the sampler by one that trains the high level. Rewards see the prompt without
the instruction, and the mode's name as the column `mode`. Refused: data that has such a column, and
a mode whose instruction makes a prompt too long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .backbone import SharedBackbone
from .config import PPOConfig, checked_class
from .data import PromptSet, load_rows
from .errors import UserError
from .heads import last_states
from .hierarchical_config import HierarchicalConfig
from .mode_policy import ModeLearner, ModePolicy
from .modes import with_instruction
from .pretrained import context_length
from .rewards.functions import RewardFunction
from .rollout.groups import GroupSampler, Sampled
from .trainer import PPOTrainer
from .types import Prompts, Rollout

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["HierarchicalTrainer", "ModeEngine", "ModePrompts"]

COLUMN = "mode"
STANDARD = 64  # training prompts that center and scale of the states are taken from
ENDLESS = 2**62


class ModePrompts:
    """The tokens of every prompt in every mode.

    Args:
        sets: whose prompts these are.
        modes: instructions by name.
        context: the model's longest sequence, of which response_length is for the response.

    Raises:
        UserError: a prompt that a mode's instruction makes too long.
    """

    def __init__(
        self,
        sets: Iterable[PromptSet],
        modes: Mapping[str, str],
        tokenizer: Any,
        *,
        context: int,
        response_length: int,
    ):
        self.names = list(modes)
        self.pad_token_id = tokenizer.pad_token_id
        self.tokens: dict[tuple[str, str], Sequence[int]] = {}
        limits = {"context": ENDLESS, "response_length": response_length}
        for prompts in sets:
            for name, instruction in modes.items():
                rows = [
                    {"prompt": with_instruction(r["prompt"], instruction)} for r in prompts.rows
                ]
                found = PromptSet.tokenize(rows, tokenizer, **limits)
                for text, ids in zip(prompts.texts, found.tokens, strict=True):
                    if len(ids) + response_length > context:
                        raise UserError(
                            f"in the mode {name!r} the prompt {text[:60]!r} has {len(ids)} tokens, "
                            f"which with response_length {response_length} exceeds the model's "
                            f"context of {context}; shorten the mode's instruction or the prompt, "
                            "or lower response_length"
                        )
                    self.tokens[text, name] = ids

    def batch(self, prompts: Prompts, modes: Sequence[str]) -> Prompts:
        """The same prompts, each with the tokens that its mode gives it and the mode's name."""
        pairs = list(zip(prompts.texts, modes, strict=True))
        rows = [{**row, COLUMN: mode} for row, mode in zip(prompts.columns, modes, strict=True)]
        tokens = [self.tokens[pair] for pair in pairs]
        given = PromptSet(rows, prompts.texts, tokens, self.pad_token_id)
        return given.batch(prompts.tokens.device)


class ModeEngine:
    """An engine that first picks a mode for every prompt.

    Args:
        engine: samples the responses.
        microbatch_tokens: in one forward of the prompts, padding counted.
    """

    told = (COLUMN,)  # the columns that it adds

    def __init__(
        self, engine: Any, policy: ModePolicy, prompts: ModePrompts, microbatch_tokens: int
    ):
        self.engine = engine
        self.backbone: SharedBackbone = engine.backbone
        self.policy = policy
        self.prompts = prompts
        self.microbatch_tokens = microbatch_tokens
        self.seen: dict[str, Tensor] = {}

    def generate(self, prompts: Prompts, generator: torch.Generator) -> Rollout:
        """One mode and one response for every prompt, drawn with ``generator``."""
        states = self.states(prompts)
        self.seen |= dict(zip(prompts.texts, states, strict=True))
        drawn = self.policy.draw(states, generator).tolist()
        names = [self.prompts.names[number] for number in drawn]
        return self.engine.generate(self.prompts.batch(prompts, names), generator)

    @torch.no_grad()
    def states(self, prompts: Prompts) -> Tensor:
        """The reference's final state of each prompt's last token, [B, D] float32.

        Nothing of them is kept for another rollout: a state's last bits depend on what is computed
        beside it, and a resumed run has to come to the same ones.
        """
        # Completions of one prompt are drawn one by one, but its state is computed once.
        first: dict[str, int] = {}
        for row, text in enumerate(prompts.texts):
            first.setdefault(text, row)
        rows = torch.tensor(list(first.values()), device=prompts.tokens.device)
        count = max(1, self.microbatch_tokens // prompts.tokens.shape[1])
        parts = []
        for some in rows.split(count):
            mask = prompts.attention_mask[some]
            trunk = self.backbone.trunk(prompts.tokens[some], mask)
            hidden = self.backbone.hidden("reference", trunk, mask)
            parts.append(last_states(hidden, mask).float())
        number = {text: i for i, text in enumerate(first)}
        return torch.cat(parts)[[number[text] for text in prompts.texts]]


class ModeSampler(GroupSampler):
    """A sampler whose scores also train the high level."""

    def __init__(self, learner: ModeLearner, engine: Any, *given: Any):
        super().__init__(engine, *given)
        self.modes = engine
        self.learner = learner

    def __call__(self, batch: PromptSet, generator: torch.Generator) -> Sampled:
        """``batch`` has each prompt once."""
        self.modes.seen = {}
        sampled = super().__call__(batch, generator)
        prompts = sampled.rollout.prompts
        states = torch.stack([self.modes.seen[text] for text in prompts.texts])
        numbers = [self.learner.names.index(row[COLUMN]) for row in prompts.columns]
        modes = torch.tensor(numbers, device=states.device)
        metrics = self.learner.update(states, modes, sampled.scores)
        return sampled._replace(metrics=sampled.metrics | metrics)


class HierarchicalTrainer(PPOTrainer):
    """Trains a policy over response modes and a policy over tokens; arguments are `PPOTrainer`'s.

    `args.modes` says which modes; they are told to reward functions as the column `mode`, in
    samples.jsonl beside every completion, and as `mode/...` in metrics.jsonl. The policy over modes
    is `mode_policy.safetensors` in every checkpoint.

    Raises:
        UserError: as PPOTrainer's; modes that cannot be, or that make a prompt too long; data with
            a column `mode`.
    """

    config_class: ClassVar[type[PPOConfig]] = HierarchicalConfig

    def __init__(
        self,
        model: str | SharedBackbone | None = None,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
        args: HierarchicalConfig | None = None,
        train_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: str | Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        *,
        name: str | None = None,
        **others: Any,
    ):
        checked = checked_class(args, HierarchicalConfig, type(self).__name__)
        assert isinstance(checked, HierarchicalConfig) and isinstance(checked.modes, dict)
        modes = checked.modes
        train = load_rows(checked.dataset if train_dataset is None else train_dataset)
        rows, eval_rows = with_column(train, next(iter(modes))), None
        if eval_dataset is not None:
            eval_rows = with_column(load_rows(eval_dataset), next(iter(modes)))
        super().__init__(
            model, reward_funcs, checked, rows, eval_rows, processing_class, callbacks,
            name=name or "hierarchical", **others,
        )  # fmt: skip
        self.folder.note_given(model, train_dataset, eval_dataset, reward_funcs)
        decoder, tokenizer = self.backbone.decoder.config, self.engine.tokenizer
        prompts = ModePrompts(
            (self.train_prompts, self.held_out), modes, tokenizer,
            context=context_length(decoder), response_length=self.config.response_length,
        )  # fmt: skip
        self.modes = ModePolicy(len(modes), decoder.hidden_size).to(self.backbone.device)
        self.engine = ModeEngine(self.engine, self.modes, prompts, self.config.microbatch_tokens)
        some = self.train_prompts.take(range(min(STANDARD, len(self.train_prompts))))
        with self.timer("load"):
            self.modes.standardize(self.engine.states(some.batch(self.backbone.device)))
        learner = ModeLearner(self.modes, prompts.names, checked)
        self.sampler = ModeSampler(
            learner, self.engine, self.reward, self.train_prompts, self.shuffler, self.config
        )
        self.backbone.further_heads["mode_policy"] = self.modes
        self.run.others["modes"] = learner


def with_column(rows: Sequence[Mapping[str, Any]], mode: str) -> list[Mapping[str, Any]]:
    """Rows with a place for the mode, so that rewards are probed as they will be called."""
    for number, row in enumerate(rows, start=1):
        if COLUMN in row:
            raise UserError(
                f"row {number} of the data has a column {COLUMN!r}, where rewards are told the "
                "mode that was picked; rename it"
            )
    return [{**row, COLUMN: mode} for row in rows]
