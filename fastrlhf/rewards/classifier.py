"""Sequence classifiers as rewards: our own reward models, and any that transformers loads.

A classifier with one output gives its logit. One with several gives the log-probability of the
label after the `#`: `someone/sentiment#POSITIVE`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import UserError, nearest
from ..pretrained import check_hub, context_length
from .model import RewardModel, is_reward_model
from .registry import RewardFunction

__all__ = ["ClassifierReward", "load_classifier"]

BATCH = 16


def load_classifier(name: str) -> RewardFunction:
    """The reward in a folder or on a hub."""
    folder, _, label = name.partition("#")
    made_here = [path for path in (Path(folder), Path(folder) / "model") if is_reward_model(path)]
    if made_here:
        return RewardModel.from_pretrained(made_here[0])
    return ClassifierReward.from_pretrained(folder, label or None)


class ClassifierReward:
    """A model for sequence classification of transformers as a reward function.

    Args:
        model: in evaluation mode.
        column: of the logits; None: the only one.
    """

    def __init__(self, model: Any, tokenizer: Any, column: int | None = None, name: str = "judge"):
        self.model, self.tokenizer, self.column = model, tokenizer, column
        self.__name__ = name
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        # A decoder reads the last token that is not padding, wherever that is.
        tokenizer.padding_side = "right"
        # What is judged stands at the end.
        tokenizer.truncation_side = "left"
        self.longest = min(tokenizer.model_max_length, positions(model))
        self.told = False

    @classmethod
    def from_pretrained(cls, name: str, label: str | None = None) -> ClassifierReward:
        """Load a classifier by folder or hub name.

        Raises:
            UserError: no such model, or several labels of which none is chosen.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            if not Path(name).is_dir():
                check_hub(name)
            model = AutoModelForSequenceClassification.from_pretrained(name).eval()
            model = model.to("cuda" if torch.cuda.is_available() else "cpu")
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (UserError, OSError, ValueError, RuntimeError, SafetensorError) as error:
            # The hub's own words: what `check_hub` says is of language models.
            said = error.__cause__ if isinstance(error, UserError) else error
            reason = " ".join(str(said).split())[:200]
            raise UserError(
                f"the classifier {name!r} cannot be loaded ({reason}): give a folder that "
                "`fastrlhf reward` wrote, or a model for sequence classification"
            ) from error
        labels = {str(v): int(k) for k, v in model.config.id2label.items()}
        if label is None and len(labels) > 1:
            raise UserError(
                f"the classifier {name!r} has the labels {', '.join(labels)}; choose one: "
                f"{name}#{next(iter(labels))}"
            )
        if label is not None and label not in labels:
            raise UserError(
                f"the classifier {name!r} has no label {label!r}; {nearest(label, labels)}"
            )
        column = None if label is None else labels[label]
        return cls(model, tokenizer, column, Path(name).name)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **_: object
    ) -> list[float]:
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            given = self.tokenizer(
                batch, padding=True, return_tensors="pt", truncation=self.longest < sys.maxsize,
                max_length=self.longest if self.longest < sys.maxsize else None,
            )  # fmt: skip
            if not self.told and given["input_ids"].shape[1] == self.longest:
                self.tell_truncation(batch)
            logits = self.model(**given.to(self.model.device)).logits.float()
            one = logits.shape[1] == 1
            scores += (
                logits[:, 0] if one else logits.log_softmax(-1)[:, self.column or 0]
            ).tolist()
        return scores

    def tell_truncation(self, texts: Sequence[str]) -> None:
        found = max(map(len, self.tokenizer(list(texts), verbose=False)["input_ids"]))
        if found > self.longest:
            self.told = True
            warnings.warn(
                f"the judge {self.__name__!r} reads {self.longest} tokens, and a text has {found}: "
                "of such texts it sees the end; shorten prompts or response_length",
                stacklevel=3,
            )


def positions(model: Any) -> int:
    """Tokens that a model has positions for; sys.maxsize where it does not say."""
    length = context_length(model.config.get_text_config())
    for name, module in model.named_modules():
        # RoBERTa counts from behind its padding token's position.
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return min(length, module.num_embeddings) - module.padding_idx - 1
    return length
