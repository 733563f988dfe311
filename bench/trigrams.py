"""A judge of fluency that no policy here is trained on: word trigrams counted in movie reviews.

It shares no weights with policy or reference, knows nothing of sentiment, and is interpolated as
Witten and Bell (1991) do: a context's count of different next words says how far to trust it.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

__all__ = ["TrigramJudge"]

WORDS = re.compile(r"[\w']+|[^\w\s]")


class TrigramJudge:
    """A reward function: nats a word, at most 0; None for a completion without words."""

    def __init__(self, texts: Sequence[str]):
        self.counts: list[Counter] = [Counter(), Counter(), Counter()]
        # By context: how often it was seen, and with how many different next words.
        self.seen: Counter = Counter()
        self.followers: dict[tuple, int] = defaultdict(int)
        for text in texts:
            words = ["", "", *WORDS.findall(text.lower())]
            for i in range(2, len(words)):
                for order in range(3):
                    gram = tuple(words[i - order : i + 1])
                    self.followers[gram[:-1]] += not self.counts[order][gram]
                    self.counts[order][gram] += 1
                    self.seen[gram[:-1]] += 1
        self.unseen = 1 / (1 + len(self.counts[0]))

    def probability(self, gram: tuple[str, ...]) -> float:
        """Of the last word after the others."""
        lower = self.probability(gram[1:]) if len(gram) > 1 else self.unseen
        context = gram[:-1]
        if not self.seen[context]:
            return lower
        count, different = self.counts[len(context)][gram], self.followers[context]
        return (count + different * lower) / (self.seen[context] + different)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **_: object):
        return [self.judge(*pair) for pair in zip(prompts, completions, strict=True)]

    def judge(self, prompt: str, completion: str) -> float | None:
        known = ["", "", *WORDS.findall(prompt.lower())]
        words = known + WORDS.findall(completion.lower())
        grams = [tuple(words[i - 2 : i + 1]) for i in range(len(known), len(words))]
        if not grams:
            return None
        return sum(math.log(self.probability(gram)) for gram in grams) / len(grams)
