"""The decode loop: slots that are filled with the next prompt as soon as a sequence ends.

A prompt is run once for all sequences that start from it while one of them is being sampled. Rows
that ended are not computed: the sequences still running are in the first slots. Their last token's
state predicts nothing and is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .draft import Draft, refuse_broken
from .steps import FamilySteps

__all__ = ["SlotLoop"]

Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SlotLoop:
    """Samples the responses of a draft.

    Args:
        steps: the forwards.
        draft: what is filled in.
        draw: final states [n, D] and uniform numbers [n] -> tokens and log-probabilities [n].
        stop: the token that ends a response; None: nothing does.
        budget_mb: of the frozen layers' states on the device.
    """

    def __init__(
        self,
        steps: FamilySteps,
        draft: Draft,
        draw: Draw,
        *,
        stop: int | None,
        budget_mb: int | None,
    ):
        self.steps, self.cache, self.draft, self.draw = steps, steps.cache, draft, draw
        self.stop, self.budget_mb = stop, budget_mb
        mask = draft.prompts.attention_mask
        self.lengths: list[int] = mask.sum(1).tolist()
        numbers: dict[tuple[int, ...], int] = {}
        rows = draft.prompts.tokens.masked_fill(~mask, -1).tolist()
        # Sequences with the same prompt have the same number: the first one's index.
        self.prompt = [numbers.setdefault(tuple(row), i) for i, row in enumerate(rows)]
        self.first: dict[int, Tensor] = {}  # by prompt: the state that predicts the first token
        self.slots: list[int] = []  # the sequence in each slot in use
        self.made: list[int] = []  # tokens that it has so far
        self.waiting = 0  # the first sequence that has not begun

    def run(self) -> None:
        width = self.draft.logprobs.shape[1]
        hidden = self.admit()
        while self.slots:
            rows, made = self.tensor(self.slots), self.tensor(self.made)
            drawn, logprobs = self.draw(hidden, self.draft.uniform[rows, made])
            self.draft.add(rows, made, drawn, logprobs)
            numbers = drawn.tolist()
            refuse_broken(numbers)
            stopped = [number == self.stop for number in numbers]
            self.draft.ended[rows] = self.tensor(stopped)
            over = [s or m + 1 == width for s, m in zip(stopped, self.made, strict=True)]
            kept = self.leave(over) if any(over) else None
            states = []
            if self.slots:
                states.append(self.step(drawn if kept is None else drawn[kept]))
            self.made = [m + 1 for m in self.made]
            if self.waiting < len(self.prompt) and len(self.slots) < self.cache.slots:
                states.append(self.admit())
            if states:
                hidden = torch.cat(states)

    def leave(self, over: list[bool]) -> Tensor:
        """Empty the slots of sequences that are over; which slots the others were in, [n]."""
        going = [i for i, ends in enumerate(over) if not ends]
        order = going[:]
        holes = [i for i in range(len(going)) if over[i]]
        # Only who is beyond the end moves, into the place of one who left.
        if holes:
            movers = [i for i in going if i >= len(going)]
            width = max(self.column(i) for i in movers) + 1
            self.cache.copy(movers, holes, width)
            order = list(range(len(going)))
            for hole, mover in zip(holes, movers, strict=True):
                order[hole] = mover
        self.slots = [self.slots[i] for i in order]
        self.made = [self.made[i] for i in order]
        return self.tensor(order)

    def column(self, slot: int) -> int:
        """Where the newest token of a slot goes in the cache."""
        return self.lengths[self.slots[slot]] + self.made[slot]

    def step(self, tokens: Tensor) -> Tensor:
        """Run the newest tokens, [n]; the states that predict the next ones, [n, D]."""
        columns = [self.column(i) for i in range(len(self.slots))]
        states = self.steps.tokens(tokens, self.tensor(columns), max(columns) + 1)
        if states.trunk is not None:
            places = [
                sequence * self.draft.length + self.draft.start + made
                for sequence, made in zip(self.slots, self.made, strict=True)
            ]
            self.draft.keep_states(torch.tensor(places), states.trunk[:, 0], self.budget_mb)
        return states.last

    def admit(self) -> Tensor:
        """Give free slots to the next sequences; the states that predict their first tokens."""
        used = len(self.slots)
        stop = min(len(self.prompt), self.waiting + self.cache.slots - used)
        coming = list(range(self.waiting, stop))
        self.waiting = stop
        here: dict[int, int] = {}
        for slot, sequence in enumerate(self.slots):
            here.setdefault(self.prompt[sequence], slot)
        placed = [(used + i, self.prompt[sequence]) for i, sequence in enumerate(coming)]
        copied = [(slot, prompt) for slot, prompt in placed if prompt in here]
        self.cache.copy(
            [here[prompt] for _, prompt in copied], [slot for slot, _ in copied],
            max((self.lengths[prompt] for _, prompt in copied), default=0),
        )  # fmt: skip
        fresh = [(slot, prompt) for slot, prompt in placed if prompt not in here]
        if fresh:
            self.prefill(fresh)
        self.slots += coming
        self.made += [0] * len(coming)
        return torch.stack([self.first[prompt] for _, prompt in placed])

    def prefill(self, placed: list[tuple[int, int]]) -> None:
        """Run the prompts of ``placed``, pairs of a slot and a prompt, each once."""
        prompts = list(dict.fromkeys(prompt for _, prompt in placed))
        number = {prompt: i for i, prompt in enumerate(prompts)}
        lengths = [self.lengths[prompt] for prompt in prompts]
        start, width = self.draft.start, max(lengths)
        tokens = self.draft.tokens.new_zeros(len(prompts), width)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            tokens[row, :length] = self.draft.tokens[prompt, start - length : start]
        states = self.steps.prompts(
            tokens, self.tensor(lengths), self.tensor([slot for slot, _ in placed]),
            self.tensor([number[prompt] for _, prompt in placed]),
        )  # fmt: skip
        for prompt, state in zip(prompts, states.last, strict=True):
            if states.trunk is not None and prompt not in self.first:
                self.keep_prompt(prompt, states.trunk[number[prompt]])
            self.first[prompt] = state

    def keep_prompt(self, prompt: int, states: Tensor) -> None:
        """Keep a prompt's states [w, D] for every sequence that starts from it."""
        length, end = self.lengths[prompt], self.draft.start
        columns = torch.arange(end - length, end)
        sequences = [i for i, other in enumerate(self.prompt) if other == prompt]
        index = (torch.tensor(sequences)[:, None] * self.draft.length + columns).flatten()
        self.draft.keep_states(index, states[:length].repeat(len(sequences), 1), self.budget_mb)

    def tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self.draft.tokens.device)
