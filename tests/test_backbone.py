"""Roles share weights, and the reference is the untouched base whatever the policy becomes."""

import warnings

import pytest
import tiny
import tiny_families
import torch
from peft import PeftModel

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.checkpoint import save_weights
from fastrlhf.errors import UserError

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
    before = states(b, "policy")
    with pytest.raises(RuntimeError), b.role("reference"):
        raise RuntimeError
    assert torch.equal(states(b, "policy"), before)
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


def test_an_adapter_critic_is_saved_with_its_adapter(tmp_path):
    save_weights(backbone(critic="adapter"), tmp_path / "final")
    assert (tmp_path / "final/critic/adapter_model.safetensors").exists()
    assert (tmp_path / "final/value_head.safetensors").exists()


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


def test_saved_adapter_loads_with_peft(tmp_path):
    b = backbone()
    disturb(b)
    folder = save_weights(b, tmp_path / "checkpoints" / "final")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny.model(), folder)
    with torch.no_grad():
        theirs = loaded(TOKENS[1:]).logits
        hidden = b.hidden("policy", b.trunk(TOKENS[1:], MASK[1:]), MASK[1:])
        ours = b.head.logits(hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not list((tmp_path / "checkpoints").glob(".*")), "temporary folders are left behind"


def test_from_pretrained_brings_its_tokenizer(tmp_path):
    b = SharedBackbone.from_pretrained(str(tiny.folder(tmp_path)), train_layers=1, critic=None)
    assert b.tokenizer is not None and b.tokenizer.eos_token_id == 0
    assert b.value_head is None and b.halves.split == 3
