"""Comparisons: every pair once, every text once, and no text on both sides of a split."""

import itertools

import pytest
import torch

from fastrlhf.comparisons import (
    PairedTexts,
    RatedTexts,
    check_compared,
    epochs_of,
    rows_among,
    with_gap,
)
from fastrlhf.errors import UserError


def rated(ratings, prompts=None, gap=0.0):
    n = len(ratings)
    return RatedTexts(
        [[i + 1] for i in range(n)],
        torch.tensor(ratings, dtype=torch.float32),
        torch.tensor(prompts or [0] * n),
        gap,
    )


def pairs_of(preferences):
    return [
        (int(part.texts[c]), int(part.texts[r]), float(m))
        for part in preferences
        for c, r, m in zip(part.chosen, part.rejected, part.margin, strict=True)
    ]


def test_all_pairs_of_ratings(monkeypatch):
    ratings = [0.0, 1.0, 3.0, 1.0, 2.4]
    expected = {
        (i, j) for i, j in itertools.permutations(range(5), 2) if ratings[i] - ratings[j] > 0.5
    }
    # In one piece, and in pieces that do not divide the texts.
    for rows in (512, 2):
        monkeypatch.setattr("fastrlhf.comparisons.ROWS", rows)
        found = pairs_of(rated(ratings, gap=0.5).pairs())
        assert {(i, j) for i, j, _ in found} == expected and len(found) == len(expected)
        assert all(m == pytest.approx(ratings[i] - ratings[j]) for i, j, m in found)


def test_batches_of_ratings_compare_what_is_in_them():
    data = rated([float(i % 7) for i in range(40)], prompts=[i // 10 for i in range(40)])
    batches = list(data.batches(5, torch.Generator().manual_seed(0)))
    assert sorted(t for b in batches for t in b.texts.tolist()) == list(range(40))
    for better, worse, margin in pairs_of(batches):
        assert data.ratings[better] - data.ratings[worse] == margin > 0
        assert data.prompts[better] == data.prompts[worse]
    # Completions of a prompt are dealt together: otherwise few would meet.
    assert len(pairs_of(batches)) > 100


def test_batches_of_pairs_hold_each_pair_and_each_text_once():
    data = PairedTexts(
        [[i] for i in range(6)], torch.tensor([0, 0, 2, 4]), torch.tensor([1, 2, 3, 5]),
        torch.tensor([0.0, 1.0, 2.0, 3.0]),
    )  # fmt: skip
    batches = list(data.batches(3, torch.Generator().manual_seed(1)))
    assert len(batches) == data.num_batches(3) == 2
    assert sorted(pairs_of(batches)) == [(0, 1, 0.0), (0, 2, 1.0), (2, 3, 2.0), (4, 5, 3.0)]
    assert all(len(b.texts.unique()) == len(b.texts) for b in batches)


def test_no_text_is_on_both_sides_of_a_split():
    chain = PairedTexts([[i] for i in range(11)], torch.arange(10), torch.arange(10) + 1,
                        torch.zeros(10))  # fmt: skip
    train, held_out = chain.split(3, seed=0)
    assert len(held_out) == 3
    assert not {tuple(x) for x in train.tokens} & {tuple(x) for x in held_out.tokens}
    everything = PairedTexts([[0], [1]], torch.tensor([0, 0]), torch.tensor([1, 1]), torch.zeros(2))
    with pytest.raises(UserError, match="shares a text"):
        everything.split(1, seed=0)
    twice = RatedTexts(
        [[i // 2] for i in range(20)], torch.arange(20.0), torch.zeros(20, dtype=torch.long)
    )
    train, held_out = twice.split(5, seed=0)
    assert not {tuple(x) for x in train.tokens} & {tuple(x) for x in held_out.tokens}
    with pytest.raises(UserError, match="no two of one prompt"):
        rated([1.0, 1.0, 1.0, 2.0]).split(2, seed=0)


def chains(lengths):
    """Pairs of neighbours in chains of so many pairs each."""
    chosen, texts = [], 0
    for length in lengths:
        chosen += range(texts, texts + length)
        texts += length + 1
    chosen = torch.tensor(chosen)
    return PairedTexts([[i] for i in range(texts)], chosen, chosen + 1, torch.zeros(len(chosen)))


@pytest.mark.parametrize(
    ("lengths", "asked", "held_out", "lost"),
    [
        ([4] * 100, 80, 80, 0),
        ([1] * 20, 5, 5, 0),
        ([3] * 100, 80, 78, 0),
        ([300, *[1] * 100], 80, 80, 0),  # one that is too large is left whole
        ([300, *[1] * 41], 80, 41, 0),
        ([300, 60, 50], 40, 40, 10),  # the smallest is cut
    ],
)
def test_a_split_keeps_groups_of_pairs_whole(lengths, asked, held_out, lost):
    data = chains(lengths)
    assert data.groups().unique(return_counts=True)[1].tolist() == lengths
    for seed in (0, 1):
        train, held = data.split(asked, seed)
        assert len(held) == held_out and len(data) - len(train) - held_out <= lost
        assert not {tuple(x) for x in train.tokens} & {tuple(x) for x in held.tokens}
        assert [part.tokens for part in data.split(asked, seed)] == [train.tokens, held.tokens]


def test_another_seed_holds_out_other_groups():
    held = [chains([4] * 100).split(80, seed)[1].tokens for seed in (0, 1)]
    assert held[0] != held[1]


def test_a_text_is_not_compared_with_itself():
    twice = RatedTexts([[7], [7], [8]], torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 0]))
    for parts in (twice.pairs(), twice.batches(2, torch.Generator().manual_seed(0))):
        found = {(twice.ratings[i].item(), twice.ratings[j].item()) for i, j, _ in pairs_of(parts)}
        assert found == {(3.0, 2.0), (2.0, 1.0)}


def test_parts_are_found_in_the_whole():
    data = rated([float(i) for i in range(9)])
    part = data.sample(4, seed=3)
    rows = rows_among(part, data)
    assert [data.tokens[row] for row in rows] == part.tokens
    assert data.ratings[rows].equal(part.ratings)
    assert with_gap(part, 2.0).gap == 2.0


def test_a_prompt_is_on_one_side_of_a_split_with_all_its_texts():
    prompts = [i // 4 for i in range(80)]
    data = rated([float(i) for i in range(80)], prompts=prompts)
    for seed in range(5):
        train, held_out = data.split(10, seed)
        assert not set(train.prompts.tolist()) & set(held_out.prompts.tolist())
        assert len(held_out) == 12 and len(train) == 68
        # A sample's texts meet: only the last prompt may be cut.
        found = data.sample(10, seed).prompts.unique(return_counts=True)[1]
        assert sorted(found.tolist()) == [2, 4, 4]
    # Of two prompts one is left to train on, however many rows are asked for.
    train, held_out = rated([0.0, 1.0, 2.0, 3.0], prompts=[0, 1, 0, 1]).split(3, seed=0)
    assert len(train) == len(held_out) == 2


def test_an_epoch_ends_with_its_last_batch_that_compares_anything():
    # Three of four texts answer a prompt of their own: most batches compare nothing.
    data = rated([0.0, 1.0, *range(6)], prompts=[0, 0, 1, 2, 3, 4, 5, 6])
    generator = torch.Generator().manual_seed(0)
    found = list(epochs_of(data, 4, 1, generator))
    assert 0 < len(found) < 4 * data.num_batches(1)
    assert all(ends and epoch == int(epoch) for _, epoch, ends in found)
    pairs = PairedTexts(
        [[i] for i in range(8)], torch.arange(0, 8, 2), torch.arange(1, 8, 2), torch.zeros(4)
    )
    found = list(epochs_of(pairs, 2, 2, generator))
    assert [(epoch, ends) for _, epoch, ends in found] == [
        (0.5, False), (1.0, True), (1.5, False), (2.0, True),
    ]  # fmt: skip


def test_without_a_pair_to_evaluate_on():
    fine, alike = rated([0.0, 1.0], gap=0.5), rated([0.0, 0.4], gap=0.5)
    check_compared(fine, fine, 0.5)
    with pytest.raises(UserError, match=r"2 texts held out.*eval_rating_gap \(0.5\); lower it"):
        check_compared(alike, fine, 0.5)
    with pytest.raises(UserError, match=r"2 texts sampled from training.*eval_rating_gap"):
        check_compared(fine, alike, 0.5)
