"""Rewards that read the completion alone: sentiment, length, repetition, format."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from ..errors import UserError
from ..text_figures import distinct
from .registry import register

__all__ = ["format_match", "length_band", "repetition", "sentiment"]


@register("sentiment", bounds=(-1.0, 1.0))
def sentiment(completions: Sequence[str], **_: object) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 to 1 (Hutto and Gilbert 2014).

    The reward of Ziegler et al. 2019 in small: a rule-based judge in the place of their classifier.

        >>> sentiment(completions=["a wonderful film"])
        [0.5719]
    """
    analyzer = vader()
    return [analyzer.polarity_scores(text)["compound"] for text in completions]


@functools.cache
def vader():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "the reward 'sentiment' needs vaderSentiment; run: pip install vaderSentiment"
        ) from error
    return SentimentIntensityAnalyzer()


@register("length_band", bounds=(0.0, 1.0))
def length_band(
    completions: Sequence[str], *, low: int = 10, high: int = 40, **_: object
) -> list[float]:
    """1 for a completion of ``low`` to ``high`` words; outside it falls with the ratio to the band.

    >>> length_band(completions=["one two three", "one", ""], low=2, high=6)
    [1.0, 0.5, 0.0]
    >>> length_band(completions=["one two three four"], low=1, high=2)
    [0.5]
    """
    if not 1 <= low <= high:
        raise UserError(f"length_band({low}, {high}) is no band; low is at least 1, high not less")
    counts = [len(text.split()) for text in completions]
    return [min(count / low, high / max(count, 1), 1.0) for count in counts]


@register("repetition", bounds=(-1.0, 0.0))
def repetition(completions: Sequence[str], *, n: int = 2, **_: object) -> list[float]:
    """Minus the share of word n-grams that were there before in the completion, from -1 to 0.

    >>> repetition(completions=["good good good good good", "a film to remember"])
    [-0.75, 0.0]
    """
    if n < 1:
        raise UserError(f"repetition({n}) counts no words; n is at least 1")
    return [distinct([text.lower()], n) - 1.0 for text in completions]


@register("format_match", bounds=(0.0, 1.0))
def format_match(completions: Sequence[str], *, pattern: str, **_: object) -> list[float]:
    """1 where the whole completion, without space at its ends, matches the regular expression.

    >>> format_match(completions=["<b>7</b>", "7"], pattern="<b>.*</b>")
    [1.0, 0.0]
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"format_match's pattern {pattern!r} cannot be read ({error})") from error
    return [float(compiled.fullmatch(text.strip()) is not None) for text in completions]
