"""A judge that no policy here is trained on: are these the words that people's reviews are made of?

Its score of a completion is the mean over its words of log p - log q, p a word's share of the
published reviews, q its share of the whole rollout: the mean of a rollout is minus the KL of its
words to theirs. It knows no sentiment and no order. Words that no review has are left out: a small
model makes up many, and fewer of them would pass for better. A judge by likelihood alone, of word
trigrams, was tried first and was fooled: "funny, funny, funny" is likely.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["ReviewWords"]

WORDS = re.compile(r"[\w']+")


class ReviewWords:
    """A reward function: nats a word; None for a completion without a word of ``texts``."""

    def __init__(self, texts: Sequence[str]):
        self.counts = Counter(word for text in texts for word in WORDS.findall(text.lower()))
        self.total = self.counts.total()

    def __call__(self, completions: Sequence[str], **_: object) -> list[float | None]:
        words = [
            [word for word in WORDS.findall(text.lower()) if word in self.counts]
            for text in completions
        ]
        used = Counter(word for some in words for word in some)

        def gap(word: str) -> float:
            return math.log(self.counts[word] / self.total) - math.log(used[word] / used.total())

        return [sum(map(gap, some)) / len(some) if some else None for some in words]
