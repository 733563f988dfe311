"""The high level: which response mode a prompt is answered in, and how it learns that.

The mode m of a prompt is drawn from `softmax(W x)`, the expected score of the prompt is
`level + spread · (w · x)`, and x is the frozen base's final state h of the prompt's last token:

    x = [(h - center) / scale / sqrt(D), 1]

center and scale are the mean and deviation of h over some training prompts, so that what prompts
have in common, which is most of h, does not drown what they differ in. The last entry is the
bias. Adam moves every weight alike, so a larger one would be learnt first, and the mode that is
best on average be picked for all prompts until the others had caught up.

A rollout is a batch of one-step episodes (a contextual bandit). With A = score - expected score,
divided by its root mean square, the high level takes `num_ppo_epochs` steps of PPO's clipped loss
with an entropy bonus and the squared error of the expected score. The baseline is a value of the
prompt, not a moving average: scores differ between prompts more than between modes, and an average
would credit a mode with the prompts that it happened to meet. level and spread are moving averages
all the same, so that the value has no scale to learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf_kernels import PolicyLossSpec, policy_loss, sample, value_loss

from .advantages import explained_variance
from .controllers import MovingAverage
from .errors import SelfCheckError, UserError
from .hierarchical_config import HierarchicalConfig
from .optimizer_state import load_optimizer_state, optimizer_numbers, optimizer_tensors
from .run_state import as_bytes, as_text

__all__ = ["ModeLearner", "ModePolicy"]

DECAY = 0.9  # of the moving averages of the scores


class ModePolicy(nn.Module):
    """A linear policy over K modes and a linear value, both of a prompt's state; float32.

    Args:
        modes: K. hidden_size: D.
    """

    def __init__(self, modes: int, hidden_size: int):
        super().__init__()
        self.policy = nn.Parameter(torch.zeros(modes, hidden_size + 1))
        self.value = nn.Parameter(torch.zeros(hidden_size + 1))
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))

    @torch.no_grad()
    def standardize(self, states: Tensor) -> None:
        """Take center and scale from the states of some prompts, [n, D]."""
        states = states.to(self.center)
        self.center.copy_(states.mean(0))
        deviation = states.std(0, correction=0)
        # A number that is the same for all prompts says nothing, and rounding must not speak.
        self.scale.copy_(deviation.clamp(min=max(1e-3 * float(deviation.mean()), 1e-6)))

    def features(self, states: Tensor) -> Tensor:
        """x, [n, D] -> [n, D + 1]."""
        size = self.center.numel()
        standard = (states.to(self.center) - self.center) / self.scale
        bias = standard.new_ones(len(states), 1)
        return torch.cat([standard / math.sqrt(size), bias], 1)

    def logprobs(self, features: Tensor) -> Tensor:
        """Of every mode, [n, D + 1] -> [n, K]."""
        return (features @ self.policy.T).log_softmax(-1)

    @torch.no_grad()
    def draw(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """A mode for each prompt, [n, D] -> [n] int64."""
        logits = self.features(states) @ self.policy.T
        return sample(logits, generator=generator)[0]


class ModeLearner:
    """Trains a `ModePolicy` on judged rollouts.

    Args:
        names: of the modes.
        config: num_ppo_epochs, cliprange and the mode_* are read.
    """

    def __init__(self, policy: ModePolicy, names: Sequence[str], config: HierarchicalConfig):
        self.policy, self.names, self.config = policy, list(names), config
        self.spec = PolicyLossSpec(
            cliprange_low=config.cliprange,
            cliprange_high=config.cliprange_high or config.cliprange,
            entropy_coef=config.mode_entropy_coef,
        )
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=config.mode_learning_rate)
        self.level, self.variance = MovingAverage(DECAY), MovingAverage(DECAY)

    @property
    def spread(self) -> float:
        """The deviation of a rollout's scores; 1 where they have never differed."""
        return math.sqrt(self.variance.value) or 1.0

    def expected(self, features: Tensor) -> Tensor:
        """The baseline, in units of the score: [n, D + 1] -> [n]."""
        return self.level.value + self.spread * (features @ self.policy.value)

    def loss(
        self,
        features: Tensor,
        modes: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Of n episodes: `-min(r A, clip(r) A) - mode_entropy_coef H + (w·x - target)^2 / 2`.

        Args:
            features: [n, D + 1]. modes: [n] int64. old_logprobs, advantages: [n].
            targets: [n] scores in units of `spread` from `level`.
        """
        mask = torch.ones_like(modes, dtype=torch.bool)
        logprobs = self.policy.logprobs(features)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        picked = logprobs.gather(1, modes[:, None]).squeeze(1)
        level = policy_loss(picked, old_logprobs, advantages, mask, self.spec, entropy=entropy)
        values = features @ self.policy.value
        value = value_loss(values, values.detach(), targets, mask, cliprange_value=None)
        return level.loss + value.loss

    def update(self, states: Tensor, modes: Tensor, scores: Tensor) -> dict[str, float]:
        """Learn from a rollout; its metrics.

        Args:
            states: [n, D] of the prompts. modes: [n] int64. scores: [n], NaN where not judged.

        Raises:
            SelfCheckError: the states or the weights are not finite.
        """
        judged = ~scores.isnan()
        states, modes, scores = states[judged], modes[judged], scores[judged]
        if not len(scores):
            return {}
        with torch.no_grad():
            features = self.policy.features(states)
            if not self.level.weight:
                self.observe(scores)
            expected = self.expected(features)
            advantages = scores.to(expected) - expected
            mask = torch.ones_like(modes, dtype=torch.bool)
            # The value has centred them; only their unit is arbitrary.
            scaled = advantages / (advantages.square().mean().sqrt() + 1e-8)
            targets = (scores.to(expected) - self.level.value) / self.spread
            logprobs = self.policy.logprobs(features)
            old_logprobs = logprobs.gather(1, modes[:, None]).squeeze(1)
        metrics = self.metrics(modes, scores) | {
            "mode/entropy": float(-(logprobs.exp() * logprobs).sum(-1).mean()),
            "mode/advantage_std": float(advantages.std(correction=0)),
            "mode/explained_variance": explained_variance(expected, scores.to(expected), mask),
        }
        for _ in range(self.config.num_ppo_epochs):
            self.optimizer.zero_grad()
            self.loss(features, modes, old_logprobs, scaled, targets).backward()
            self.optimizer.step()
        if not all(p.isfinite().all() for p in self.policy.parameters()):
            raise SelfCheckError(
                "the policy over modes has NaN or infinite weights; lower mode_learning_rate"
            )
        self.observe(scores)
        return metrics

    def observe(self, scores: Tensor) -> None:
        """Take a rollout's scores into the moving averages."""
        self.level.update(float(scores.mean()))
        self.variance.update(float(scores.var(correction=0)))

    def metrics(self, modes: Tensor, scores: Tensor) -> dict[str, float]:
        """The share of each mode, and the mean score of those that were drawn."""
        line: dict[str, float] = {}
        for number, name in enumerate(self.names):
            own = modes == number
            line[f"mode/share/{name}"] = float(own.float().mean())
            if own.any():
                line[f"mode/score/{name}"] = float(scores[own].mean())
        return line

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the policy's weights, as plain JSON."""
        tensors = optimizer_tensors(self.optimizer)
        averages = {"level": self.level, "variance": self.variance}
        return {
            "names": self.names,
            "averages": {name: [x.total, x.weight] for name, x in averages.items()},
            "optimizer": {name: as_text(x.float().cpu()) for name, x in tensors.items()},
            "rest": optimizer_numbers(self.optimizer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            UserError: it is of other modes, or of the same in another order.
        """
        if state["names"] != self.names:
            raise UserError(
                f"the checkpoint's modes are {', '.join(state['names'])}, not "
                f"{', '.join(self.names)}; resume with the same, in the same order"
            )
        for name, average in (("level", self.level), ("variance", self.variance)):
            average.total, average.weight = state["averages"][name]
        tensors: dict[str, Tensor] = {}
        shapes = [p.shape for p in self.policy.parameters()]
        for name, text in state["optimizer"].items():
            index, _, kind = name.partition("/")
            flat = as_bytes(text).view(torch.float32)
            tensors[name] = flat.view(shapes[int(index)] if kind != "step" else ())
        load_optimizer_state(self.optimizer, tensors, state["rest"])
