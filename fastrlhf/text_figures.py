"""What can be counted in texts without a judge: how much of them was there before.

Each figure is about the same for a text of any length, so that growth alone is no repetition: what
grows with length is counted in windows or pieces of a fixed size. Shorter texts are one window.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["compression", "distinct", "repeated_share"]

# Token pairs. In one of this many, prose repeats some 0.02 to 0.06, of any length; a text that goes
# round in fewer than 45 tokens repeats above 0.1. What goes round in more is for `compression`.
REPEATED_WITHIN = 50
# Bytes: some 700 words.
COMPRESSED_WITHIN = 4096


def distinct(texts: Sequence[str], n: int, words: int | None = None) -> float:
    """Distinct word n-grams over word n-grams in all ``texts``; 1 without any.

    Args:
        words: of each text only this many count, so that longer texts are not less distinct for
            their length. None: all.

    Source: Li et al. 2016, "A diversity-promoting objective function", distinct-1 and distinct-2.
    """
    grams = []
    for text in texts:
        own = text.split()[:words]
        grams += [tuple(own[i : i + n]) for i in range(len(own) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of token pairs that were there before in a window; 0 without a pair.

        mean over windows of 50 neighbouring pairs of `1 - len(set(window)) / 50`

    A text with fewer pairs is one window. Source: Covington and McFall 2010, the moving-average
    type-token ratio, here of pairs.
    """
    pairs = list(pairwise(tokens))
    if not pairs:
        return 0.0
    width = min(REPEATED_WITHIN, len(pairs))
    windows = len(pairs) - width + 1
    distinct_pairs = 0
    last: dict[tuple[int, int], int] = {}
    for place, pair in enumerate(pairs):
        # It counts in the windows that hold it and none like it before.
        first = max(place - width, last.get(pair, -1)) + 1
        distinct_pairs += max(0, min(place + 1, windows) - first)
        last[pair] = place
    return 1 - distinct_pairs / (windows * width)


def compression(texts: Sequence[str]) -> float:
    """Bytes that zlib makes of all texts together, piece by piece, over their own; 1 without text.

    A piece is 4096 bytes: what a longer one has in common with itself grows with its length.
    """
    raw = "\n".join(texts).encode()
    pieces = [raw[i : i + COMPRESSED_WITHIN] for i in range(0, len(raw), COMPRESSED_WITHIN)]
    return sum(len(zlib.compress(piece, 9)) for piece in pieces) / len(raw) if raw else 1.0
