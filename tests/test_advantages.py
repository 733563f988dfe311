"""Advantages as identities, and the details of whitening (docs/math.md, sections 4 and 5.2)."""

import pytest
import torch

from fastrlhf.advantages import (
    equal_scores,
    gae_advantages,
    group_advantages,
    leave_one_out_advantages,
    mean_return,
    return_advantages,
)

B, T, G = 8, 6, 4
MASK = torch.arange(T) < torch.tensor([6, 3, 5, 1, 4, 2, 6, 6])[:, None]
GROUPS = torch.arange(B) // G


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(scores, mask=MASK, **settings):
    return group_advantages(scores, torch.zeros_like(scores), GROUPS, mask, **settings).advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("score", [0.0, 0.1, -7.3, 1e6])
def test_equal_rewards_teach_a_group_nothing(scale, score):
    """Exactly: 0.1 is no float, and its mean of three is not it."""
    scores = torch.full((B,), score)
    assert (group(scores, scale=scale) == 0).all()
    assert (leave_one_out_advantages(scores, GROUPS, MASK).advantages == 0).all()


def test_group_advantages_have_mean_0_and_deviation_1_in_each_group():
    scores = draw(B)
    by_sequence = group(scores)[:, 0].view(-1, G)
    torch.testing.assert_close(by_sequence.mean(1), torch.zeros(2, dtype=torch.float64))
    deviation = scores.view(-1, G).std(1)
    torch.testing.assert_close(by_sequence.std(1), deviation / (deviation + 1e-4))
    batch = group(scores, scale="batch")[:, 0] * (scores.std() + 1e-4)
    torch.testing.assert_close(batch, group(scores, scale="none")[:, 0])


def test_leave_one_out_is_its_definition():
    scores = draw(B)
    expected = [
        scores[i] - scores[[j for j in range(B) if j // G == i // G and j != i]].mean()
        for i in range(B)
    ]
    got = leave_one_out_advantages(scores, GROUPS, MASK).advantages
    torch.testing.assert_close(got, torch.stack(expected)[:, None] * MASK)
    # Less its own share, the group's mean is the others'.
    torch.testing.assert_close(got * (G - 1) / G, group(scores, scale="none"))


def test_who_is_not_judged_counts_for_nobody():
    scores = draw(B)
    mask = MASK.clone()
    mask[1] = False
    others = scores.clone()
    others[1] = torch.nan
    for x in (scores, others):
        got = group(x, mask)
        assert (got[1] == 0).all()
        kept = scores[[0, 2, 3]]
        torch.testing.assert_close(got[0, 0], (scores[0] - kept.mean()) / (kept.std() + 1e-4))
        alone = leave_one_out_advantages(x, GROUPS, mask).advantages
        torch.testing.assert_close(alone[0, 0], scores[0] - scores[2:4].mean())
    mask[:3] = False
    assert (leave_one_out_advantages(scores, GROUPS, mask).advantages[:4] == 0).all()


def test_the_kls_share_is_centred_and_not_divided():
    scores, kl = draw(B), draw(B, seed=1)
    got = group_advantages(scores, kl, GROUPS, MASK).advantages - group(scores)
    centred = (kl.view(-1, G) - kl.view(-1, G).mean(1, keepdim=True)).view(-1, 1)
    torch.testing.assert_close(got, centred * MASK)


def test_reordering_groups_reorders_advantages():
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    scores = draw(B)
    zeros = torch.zeros_like(scores)
    shuffled = group_advantages(scores[order], zeros, GROUPS[order], MASK[order]).advantages
    torch.testing.assert_close(shuffled, group(scores)[order])


def test_lambda_0_is_the_td_residual_and_lambda_1_return_less_value():
    rewards, values = draw(B, T), draw(B, T, seed=1)
    settings = dict(gamma=0.9, whiten_advantages=False)
    td = gae_advantages(rewards, values, MASK, lam=0.0, **settings).advantages
    following = torch.zeros_like(values)
    following[:, :-1] = (values * MASK)[:, 1:]
    torch.testing.assert_close(td, (rewards + 0.9 * following - values) * MASK)
    returns = return_advantages(rewards, 0.0, MASK, gamma=0.9)
    monte_carlo = gae_advantages(rewards, values, MASK, lam=1.0, **settings)
    torch.testing.assert_close(monte_carlo.advantages, returns.advantages - values * MASK)
    torch.testing.assert_close(monte_carlo.returns, returns.returns)


def test_baselines_shift_every_token_alike():
    rewards = draw(B, T)
    plain = return_advantages(rewards, 0.0, MASK, gamma=0.9).advantages
    torch.testing.assert_close(
        return_advantages(rewards, 0.7, MASK, gamma=0.9).advantages, (plain - 0.7) * MASK
    )
    torch.testing.assert_close(mean_return(plain, MASK), plain[:, 0].mean())
    by_mean = return_advantages(rewards, None, MASK, gamma=0.9).advantages
    torch.testing.assert_close(by_mean[:, 0].mean(), torch.zeros((), dtype=torch.float64))


def test_mean_return_leaves_out_who_trains_nothing():
    mask = MASK.clone()
    mask[:, 0] = False
    mask[0] = False
    returns = draw(B, T)
    expected = returns[[1, 2, 4, 5, 6, 7], 1].sum() / 6
    torch.testing.assert_close(mean_return(returns, mask), expected)


WHITENED = {
    "gae": lambda x, **on: gae_advantages(x, draw(B, T, seed=1), MASK, gamma=0.9, lam=0.7, **on),
    "returns": lambda x, **on: return_advantages(x, 0.3, MASK, gamma=0.9, **on),
    "group": lambda x, **on: group_advantages(x[:, 0], x[:, 1], GROUPS, MASK, **on),
    "others": lambda x, **on: leave_one_out_advantages(x[:, 0], GROUPS, MASK, **on),
}


@pytest.mark.parametrize("name", WHITENED)
def test_whitening(name):
    """Mean 0 and unbiased deviation 1 over valid tokens, 0 elsewhere; the scale tells by what."""
    rewards = draw(B, T) * 3
    plain = WHITENED[name](rewards, whiten_advantages=False)
    white = WHITENED[name](rewards, whiten_advantages=True)
    kept = white.advantages[MASK]
    assert kept.mean() == pytest.approx(0, abs=1e-9)
    assert kept.var() == pytest.approx(1, abs=1e-6)
    assert (white.advantages[~MASK] == 0).all() and (plain.advantages[~MASK] == 0).all()
    raw = plain.advantages[MASK]
    torch.testing.assert_close(kept, (raw - raw.mean()) * white.scale)
    assert plain.scale == 1 and white.scale == pytest.approx(float(raw.std()) ** -1, rel=1e-6)
    torch.testing.assert_close(white.returns, plain.returns)


def test_reward_whitening_keeps_the_mean():
    rewards = draw(B, T) + 2
    learnt = return_advantages(rewards, 0.0, MASK, gamma=0.0, whiten_rewards=True)
    scaled = learnt.advantages[MASK]  # at gamma 0 a return is its reward
    assert scaled.var() == pytest.approx(1, abs=1e-6)
    assert scaled.mean() == pytest.approx(float(rewards[MASK].mean()), rel=1e-6)


def test_equal_scores():
    nan = float("nan")
    scores = torch.tensor([1.0, 1, 1, 2, 3, 3, nan, 0.5, 0.5, nan, nan, nan, nan, nan, 4])
    expected = [True, False, True, True, True]
    assert equal_scores(scores, 3).tolist() == expected
