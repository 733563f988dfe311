"""A policy that is a table of logits, in float64, on the trainer's own path to a gradient.

Its hidden states are the logits themselves (the head is the identity): scores become advantages,
advantages a loss, microbatches a sum, and the gradient is that of the logits.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from fastrlhf.algorithms import ALGORITHMS
from fastrlhf.controllers import AlgorithmState
from fastrlhf.experience import gather
from fastrlhf.losses import microbatch_loss, policy_items
from fastrlhf.microbatches import Sequences, cut
from fastrlhf.types import Experience

B, G, T, V = 6, 3, 5, 7
ALL = tuple(range(B))
MASK = torch.arange(T) < torch.tensor([5, 3, 5, 1, 4, 2])[:, None]
SCORES = torch.tensor([1.0, 0.2, -0.7, 0.4, 2.0, 0.1], dtype=torch.float64)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Tokens that train nothing are sampled ones too, of which the mask alone says so; or they are not.
EVERY = Sequences(torch.ones(B, T + 1, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool))
REAL = Sequences(torch.cat([torch.ones(B, 1, dtype=torch.bool), MASK], 1), MASK)


@dataclass(frozen=True)
class Logits:
    """Stands in for a trunk's cache: the table of logits, [B, T + 1, V]."""

    table: torch.Tensor

    def take(self, layout):
        index = layout.token_index
        return self.table.flatten(0, 1)[index.flatten()].view(*index.shape, V)


@dataclass(frozen=True)
class Scene:
    """A policy's logits beside those of the policy that sampled and of the reference."""

    logits: torch.Tensor  # [B, T + 1, V] what each token was drawn from, and a last one
    old: torch.Tensor  # [B, T + 1, V]
    reference: torch.Tensor  # [B, T + 1, V]
    tokens: torch.Tensor  # [B, T]
    old_values: torch.Tensor  # [B, T]
    value_weight: torch.Tensor  # [V]

    def logprobs(self, logits):
        return logits[:, :-1].log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    def kl(self, logits):
        ours, theirs = (x[:, :-1].log_softmax(-1) for x in (logits, self.reference))
        return (ours.exp() * (ours - theirs)).sum(-1)

    def entropy(self, logits):
        ours = logits[:, :-1].log_softmax(-1)
        return -(ours.exp() * ours).sum(-1)

    def values(self, logits):
        return logits[:, :-1] @ self.value_weight

    def experience(self, config, sequences=EVERY) -> Experience:
        exact = config.kl_estimator == "exact"
        prompt = torch.zeros(B, 1, dtype=torch.long)
        return Experience(
            tokens=torch.cat([prompt, self.tokens], 1), trunk=Logits(self.logits),
            sequences=sequences, response_mask=MASK,
            old_logprobs=self.logprobs(self.old),
            ref_logprobs=None if exact else self.logprobs(self.reference),
            ref_hidden=self.reference[:, :-1][sequences.response_mask] if exact else None,
            kl=self.kl(self.old), entropy=self.entropy(self.old),
            values=None if config.critic is None else self.old_values,
            advantages=torch.zeros(B, T), returns=torch.zeros(B, T),
        )  # fmt: skip


SCENE = Scene(
    logits=draw(B, T + 1, V, seed=0),
    old=draw(B, T + 1, V, seed=0) + 0.3 * draw(B, T + 1, V, seed=1),
    reference=draw(B, T + 1, V, seed=2),
    tokens=torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3)),
    old_values=draw(B, T, seed=4),
    value_weight=draw(V, seed=5),
)
ON_POLICY = replace(SCENE, old=SCENE.logits)


def backbone(scene: Scene):
    """Hidden states are logits; values are linear in them."""
    head = SimpleNamespace(
        weight=torch.eye(V, dtype=torch.float64), bias=None, logit_scale=1.0, softcap=None
    )
    return SimpleNamespace(
        head=head,
        reference_head=head,
        hidden=lambda role, trunk, mask, position_ids: trunk,
        values=lambda hidden, trunk, mask, position_ids: hidden @ scene.value_weight,
    )


def microbatch(scene, experience, rows=ALL, way="in_order"):
    (layout,) = cut(experience.sequences, torch.tensor(rows), way, 10**4)
    return gather(backbone(scene), experience, layout)


def ours(
    config, scene=SCENE, parts=(ALL,), state=None, way="in_order", sequences=EVERY
) -> torch.Tensor:
    """The gradient in the logits of the trainer's loss, microbatch by microbatch."""
    state = state or AlgorithmState.of(config)
    experience = scene.experience(config, sequences)
    row = ALGORITHMS[config.algorithm]
    learnt = row.advantages(SCORES, experience, config, state)
    spec = row.spec(config, float(learnt.scale), state)
    logits = scene.logits.clone().requires_grad_()
    experience = replace(
        experience, trunk=Logits(logits), advantages=learnt.advantages, returns=learnt.returns
    )
    tokens, items = int(MASK.sum()), policy_items(spec, MASK, T)
    for rows in parts:
        part = microbatch(scene, experience, rows, way)
        microbatch_loss(backbone(scene), part, spec, config, tokens, items).loss.backward()
    return logits.grad


def papers(loss, scene=SCENE) -> torch.Tensor:
    """The gradient of ``loss(logits)`` by autograd."""
    logits = scene.logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits), logits)[0]


def token_mean(x):
    return x[MASK].sum() / MASK.sum()


def sequence_mean(x):
    return ((x * MASK).sum(1) / MASK.sum(1)).mean()


def constant(x):
    """Over sequences, of the sum over tokens; by T, a fixed number, too."""
    return (x * MASK).sum(1).mean() / T
