"""Roles share weights, and the reference is the untouched base whatever the policy becomes."""

import pytest
import tiny
import tiny_families
import torch

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.errors import UserError
from fastrlhf.heads import RewardHead

TOKENS = torch.tensor([[0, 0, 5, 9, 3, 7], [4, 8, 1, 2, 9, 6]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)


def backbone(**settings) -> SharedBackbone:
    settings = {"lora": LoraSettings(rank=4), "train_layers": 2} | settings
    return SharedBackbone(tiny.model(), **settings)


def states(b: SharedBackbone, role) -> torch.Tensor:
    with torch.no_grad():
        return b.hidden(role, b.trunk(TOKENS, MASK), MASK)


def disturb(b: SharedBackbone) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in b.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def test_policy_starts_as_the_reference_to_the_last_bit():
    b = backbone()
    assert torch.equal(states(b, "policy"), states(b, "reference"))


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_the_reference_stays_the_untouched_base(critic):
    b = backbone(critic=critic)
    before = states(b, "reference")
    disturb(b)
    assert torch.equal(states(b, "reference"), before)
    assert not torch.allclose(states(b, "policy"), before)
    plain = backbone()
    assert torch.equal(states(plain, "reference"), before)


def test_an_adapter_critic_is_its_own():
    b = backbone(critic="adapter")
    disturb(b)
    assert not torch.allclose(states(b, "critic"), states(b, "policy"))


def test_roles_restore_what_was_active():
    b = backbone(critic="adapter")

    def active():
        return [(m.active_adapters, m.disable_adapters) for m in b.adapters.layers]

    before = active()
    with pytest.raises(RuntimeError), b.role("reference"):
        assert active() != before
        raise RuntimeError
    assert active() == before
    assert all(p.requires_grad for n, p in b.model.named_parameters() if "lora_" in n)


def test_only_adapters_of_the_top_layers_and_the_value_head_train():
    b = backbone()
    names = [name for name, p in b.named_parameters() if p.requires_grad]
    lora = [name for name in names if "lora_" in name]
    assert set(names) - set(lora) == {"value_head.linear.weight", "value_head.linear.bias"}
    assert {int(name.split("layers.")[1].split(".")[0]) for name in lora} == {2, 3}
    # q k v o gate up down, two matrices each, two layers
    assert len(lora) == 7 * 2 * 2


def test_gradients_reach_the_policy_and_spare_the_trunk():
    b = backbone()
    disturb(b)
    trunk = b.trunk(TOKENS, MASK)
    assert not trunk.requires_grad
    b.hidden("policy", trunk, MASK).square().sum().backward()
    trained = [p for n, p in b.named_parameters() if "lora_" in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert b.head.weight.grad is None


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_checkpointed_layers_are_run_again_in_their_role(role):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        b = backbone(critic="adapter", gradient_checkpointing=checkpointing)
        disturb(b)
        b.hidden(role, b.trunk(TOKENS, MASK), MASK).square().sum().backward()
        gradients.append({n: p.grad for n, p in b.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and len(plain) == 7 * 2 * 2
    for name in plain:
        torch.testing.assert_close(plain[name], again[name])


def test_values_start_at_zero():
    b = backbone()
    hidden = states(b, "policy")
    assert torch.equal(b.values(hidden, hidden, MASK), torch.zeros(2, 6))


def test_more_layers_than_the_model_has():
    with pytest.raises(UserError, match="4 layers"):
        backbone(train_layers=5)


def test_an_unknown_family_runs_whole_and_says_so():
    with pytest.warns(UserWarning, match="run whole"):
        b = SharedBackbone(tiny_families.unknown(), train_layers=1)
    before = states(b, "reference")
    disturb(b)
    assert torch.equal(states(b, "reference"), before)
    assert not torch.allclose(states(b, "policy"), before)


def test_from_pretrained_brings_its_tokenizer(tmp_path):
    b = SharedBackbone.from_pretrained(str(tiny.folder(tmp_path)), train_layers=1, critic=None)
    assert b.tokenizer is not None and b.tokenizer.eos_token_id == 0
    assert b.value_head is None and b.halves.split == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_rewards_are_read_at_the_last_real_token(side):
    b = backbone(critic=None, reward=True)
    lengths = [3, 6, 1]
    torch.manual_seed(2)
    rows = [torch.randint(1, 27, (n,)) for n in lengths]
    tokens = torch.zeros(3, 6, dtype=torch.long)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(6 - len(row), None) if side == "left" else slice(len(row))
        tokens[i, where], mask[i, where] = row, True
    with torch.no_grad():
        for parameter in b.role_parameters("reward"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ours = b.reward_scores(tokens, mask)
        trunk = b.trunk(tokens, mask)
        assert torch.equal(b.reward_scores(tokens, mask, trunk), ours)
        # Alone, without padding: the last state is the last.
        for i, row in enumerate(rows):
            whole = torch.ones(1, len(row), dtype=torch.bool)
            states = b.hidden("reward", b.trunk(row[None], whole), whole)
            assert b.reward_head is not None
            alone = b.reward_head(states[0, -1])
            torch.testing.assert_close(ours[i], alone, rtol=1e-4, atol=1e-5)
            if len(row) > 1:
                assert not torch.isclose(alone, b.reward_head(states[0].mean(0)), rtol=1e-2)


def test_a_reward_head_starts_small():
    torch.manual_seed(0)
    head = RewardHead(10_000)
    assert head.linear.weight.std().item() == pytest.approx(10_001**-0.5, rel=0.03)
    assert head.linear.bias.item() == 0


def test_packed_rows_are_scored_as_padded_ones():
    b = backbone(critic="adapter")
    disturb(b)
    packed = torch.cat([row[mask] for row, mask in zip(TOKENS, MASK, strict=True)])[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        trunk = b.trunk(packed, None, positions)
        together = b.hidden_together(["policy", "critic"], trunk, None, positions)
        for role, hidden in together.items():
            assert torch.equal(hidden, b.hidden(role, trunk, None, positions))
            torch.testing.assert_close(hidden[0], states(b, role)[MASK], rtol=1e-4, atol=1e-5)
        values = b.values(together["policy"], trunk, None, positions)
        padded = b.values(states(b, "policy"), b.trunk(TOKENS, MASK), MASK)
    torch.testing.assert_close(values[0], padded[MASK], rtol=1e-4, atol=1e-5)


def test_another_role_stands_in_for_the_policy_and_leaves():
    b = backbone()
    b.add_policy("other")
    disturb(b)
    policy, other = states(b, "policy"), states(b, "other")
    assert not torch.equal(policy, other)
    with pytest.raises(RuntimeError), b.policy_is("other"):
        assert torch.equal(states(b, "policy"), other)
        own, theirs = b.role_parameters("policy"), b.role_parameters("other")
        assert all(x is y for x, y in zip(own, theirs, strict=True))
        raise RuntimeError
    assert torch.equal(states(b, "policy"), policy)
    with pytest.raises(UserError, match="'others'"), b.policy_is("others"):
        pass
