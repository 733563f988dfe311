"""Every token lies where its layout says, and the budget is kept."""

import itertools

import pytest
import torch

from fastrlhf.microbatches import Sequences, cut

# Prompts of 3, 1 and 2 tokens on the left, responses of 2, 3 and 1 on the right.
SEQUENCES = Sequences(
    torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool(),
    torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool(),
)
TOKENS = torch.arange(18).view(3, 6)
ALL = torch.tensor([0, 1, 2])


def read(layout):
    """(state's token, response token) of every response token, and each row's own tokens."""
    slots = TOKENS.flatten()[layout.token_index].flatten()
    targets = TOKENS.flatten()[layout.target_index]
    assert torch.equal(TOKENS[:, 3:].flatten()[layout.response_index], targets)
    return list(zip(slots[layout.state_index].tolist(), targets.tolist(), strict=True))


@pytest.mark.parametrize("microbatching", ["sorted", "packed", "in_order"])
def test_a_response_token_is_predicted_by_the_token_before_it(microbatching):
    for budget in (1, 9, 100):
        layouts = cut(SEQUENCES, ALL, microbatching, budget)
        pairs = sorted(pair for layout in layouts for pair in read(layout))
        assert pairs == [(2, 3), (3, 4), (8, 9), (9, 10), (10, 11), (14, 15)]
        assert sum(layout.num_sequences for layout in layouts) == 3


def test_sorted_is_as_wide_as_its_longest():
    (layout,) = cut(SEQUENCES, ALL, "sorted", 12)
    # The last token of a sequence predicts nothing and is left out: 4, 3 and 2 tokens are not.
    assert layout.token_index.tolist() == [[0, 1, 2, 3], [8, 9, 10, 0], [13, 14, 0, 0]]
    assert layout.own.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert layout.attention_mask.all() and layout.position_ids is None
    long, short = cut(SEQUENCES, torch.tensor([2, 1, 0]), "sorted", 8)
    assert (long.num_tokens, short.num_tokens) == (8, 2)


def test_packed_has_no_padding_and_starts_anew_with_each_sequence():
    (layout,) = cut(SEQUENCES, torch.tensor([1, 2, 0]), "packed", 9)
    assert layout.token_index.tolist() == [[8, 9, 10, 13, 14, 0, 1, 2, 3]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert layout.attention_mask is None
    assert [x.num_tokens for x in cut(SEQUENCES, ALL, "packed", 8)] == [7, 2]


def test_in_order_is_the_rollout_itself():
    first, second = cut(SEQUENCES, ALL, "in_order", 12)
    assert torch.equal(first.token_index, TOKENS[:2])
    assert torch.equal(first.attention_mask, SEQUENCES.attention_mask[:2])
    assert torch.equal(second.token_index, TOKENS[2:])


@pytest.mark.parametrize("microbatching", ["sorted", "packed", "in_order"])
def test_the_budget_is_kept_but_for_single_sequences(microbatching):
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (torch.randint(1, 9, (50,), generator=generator) for _ in range(2))
    column = torch.arange(8)
    answered = column < responses[:, None]
    sequences = Sequences(torch.cat([column >= 8 - prompts[:, None], answered], dim=1), answered)
    rows = torch.randperm(50, generator=generator)
    for budget in (1, 10, 33, 10**6):
        layouts = cut(sequences, rows, microbatching, budget)
        assert all(x.num_tokens <= budget or x.num_sequences == 1 for x in layouts)
        seen = torch.cat([x.response_index for x in layouts]).sort().values
        assert torch.equal(seen, answered.flatten().nonzero().squeeze(-1))
        # A neighbour more would not have fitted.
        if microbatching == "packed":
            for one, other in itertools.pairwise(layouts):
                starts = (other.position_ids[0] == 0).nonzero().flatten().tolist()
                first = [*starts, other.num_tokens][1]
                assert one.num_tokens + first > budget


def test_the_cut_wastes_less_than_padding_does():
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(1, 64, (64,), generator=generator)
    answered = torch.arange(64) < responses[:, None]
    sequences = Sequences(torch.cat([torch.ones(64, 1).bool(), answered], dim=1), answered)
    slots = {
        way: sum(x.num_tokens for x in cut(sequences, torch.arange(64), way, 256))
        for way in ("sorted", "packed", "in_order")
    }
    assert slots["packed"] == responses.sum()
    assert slots["sorted"] < 1.2 * slots["packed"] < slots["in_order"] / 1.5
