"""The trunk's states of texts: kept or computed, alone or with others, a text has one score."""

import pytest
import tiny
import torch

from fastrlhf.backbone import SharedBackbone
from fastrlhf.text_states import TextStates, by_length

TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12], [3, 3, 3, 3]]


def backbone(train_layers=2):
    made = SharedBackbone(
        tiny.model(), train_layers=train_layers, critic=None, reward=True, reference=False
    )
    for parameter in made.role_parameters("reward"):
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("budget_mb", [None, 0])
@pytest.mark.parametrize("train_layers", [2, "all"])
def test_scores_are_those_of_the_backbone(train_layers, budget_mb):
    model = backbone(train_layers)
    states = TextStates(model, TEXTS, budget_mb=budget_mb, microbatch_tokens=8)
    assert (states.megabytes > 0) == (budget_mb is None and train_layers != "all")
    expected = torch.cat(
        [
            model.reward_scores(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
            for ids in TEXTS
        ]
    )
    torch.testing.assert_close(states.all_scores(), expected.detach(), rtol=1e-4, atol=1e-5)
    order = [3, 0, 4]
    torch.testing.assert_close(
        states.all_scores(order), expected[order].detach(), rtol=1e-4, atol=1e-5
    )


def test_texts_beyond_the_budget_are_computed():
    model = backbone()
    texts = [[1 + i % 20] * 60 for i in range(200)]
    # 60 states of 32 float32 a text: 136 of them make a megabyte.
    some = TextStates(model, texts, budget_mb=1)
    assert some.kept == 2**20 // (60 * 32 * 4) and some.megabytes <= 1
    whole = TextStates(model, texts).all_scores()
    torch.testing.assert_close(some.all_scores(), whole, rtol=1e-4, atol=1e-5)


def test_microbatches_keep_to_their_budget():
    parts = list(by_length([3, 1, 6, 2, 4], range(5), 8))
    assert sorted(row for part in parts for row in part) == list(range(5))
    lengths = [3, 1, 6, 2, 4]
    assert all(max(lengths[r] for r in part) * len(part) <= 8 for part in parts)
    assert list(by_length([9], [0], 8)) == [[0]]
