"""Rollouts that teach nothing, told once a run: every response cut off, every score the same.

Both are legal, and both have passed for training elsewhere: a reward that looks for an ending never
sees one in responses that are all cut off, and equal scores leave no advantage to learn from.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .config import PPOConfig
from .types import Rollout

__all__ = ["BarrenRollouts"]


class BarrenRollouts:
    """Looks at every rollout of a run.

    Args:
        config: whether responses can end, and how long they may be.
        tell: called with a sentence when one of the two is first seen.
    """

    def __init__(self, config: PPOConfig, tell: Callable[[str], object]):
        self.config = config
        self.tell = tell
        self.told: set[str] = set()

    def observe(self, rollout: Rollout, scores: Tensor) -> dict[str, float]:
        """The share of responses that were cut off and the spread of the scores, as metrics.

        Args:
            scores: [B]; NaN, where the reward did not judge, does not count.
        """
        judged = scores[~scores.isnan()]
        # The mean of equal numbers is rounded, so that their deviation may not be 0.
        differ = len(judged) > 1 and bool(judged.max() > judged.min())
        spread = float(judged.std(correction=0)) if differ else 0.0
        figures = {"objective/scores_std": spread}
        if len(judged) > 1 and not differ:
            self.once(
                "equal",
                f"all {len(judged)} scores of a rollout are {float(judged[0]):g}: there is nothing "
                "to tell its responses apart, and only the KL trains; look at samples.jsonl, and "
                "give a reward that differs, or more num_generations",
            )
        if self.config.stop_token is not None:
            figures["val/truncated"] = cut = float((~rollout.ended).float().mean())
            if cut == 1:
                self.once(
                    "cut",
                    f"{cut:.0%} of a rollout's responses were cut off at response_length "
                    f"{self.config.response_length}: a reward that needs an ending never sees one; "
                    f"raise it (to {2 * self.config.response_length}, say), or set stop_token to "
                    "null if no ending is wanted",
                )
        return figures

    def once(self, kind: str, sentence: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            self.tell(f"warning: {sentence}")
