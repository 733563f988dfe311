"""Between two adapters: the weighted sum of what they change, and the adapters at the ends."""

import json

import pytest
import tiny
import torch
from peft import PeftModel

from fastrlhf.adapters import LoraSettings
from fastrlhf.backbone import SharedBackbone
from fastrlhf.checkpoint import save_weights
from fastrlhf.errors import UserError
from fastrlhf.interpolation import save_interpolated

TOKENS = torch.tensor([[3, 7, 9, 1, 5]])


def adapter(folder, seed, *, layers=2, rank=4, alpha=8.0, model=None):
    """A random adapter of the tiny model, as a run saves it."""
    backbone = SharedBackbone(
        model or tiny.model(), lora=LoraSettings(rank, alpha), train_layers=layers, critic=None
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in backbone.trainable():
            weight.normal_(std=0.3)
    return save_weights(backbone, folder)


def change(folder):
    """What an adapter adds to each weight of the tiny model."""
    plain = dict(tiny.model().named_parameters())
    merged = PeftModel.from_pretrained(tiny.model(), str(folder)).merge_and_unload()
    return {name: weight.detach() - plain[name] for name, weight in merged.named_parameters()}


def logits(folder):
    model = PeftModel.from_pretrained(tiny.model(), str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("weights", [(0.25, 0.75), (1.0, 0.0), (-0.5, 2.0)])
def test_the_change_of_the_base_is_the_weighted_sum(tmp_path, weights):
    """Also where ranks and scales differ."""
    ends = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, rank=2, alpha=6.0)]
    first, second = map(change, ends)
    got = change(save_interpolated(ends, weights, tmp_path / "between"))
    assert any(x.abs().max() > 0.1 for x in got.values())
    for name, x in got.items():
        expected = weights[0] * first[name] + weights[1] * second[name]
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=2e-6)


def test_it_is_not_the_interpolation_of_the_factors(tmp_path):
    """The mutation that this module is there to avoid would be seen."""
    ends = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    got = change(save_interpolated(ends, (0.5, 0.5), tmp_path / "between"))
    states = [
        dict(PeftModel.from_pretrained(tiny.model(), str(x)).named_parameters()) for x in ends
    ]
    key = "base_model.model.model.layers.3.self_attn.q_proj.lora_{}.default.weight"
    a, b = (sum(state[key.format(side)] for state in states) / 2 for side in "AB")
    mixed = 2.0 * b @ a
    assert (got["model.layers.3.self_attn.q_proj.weight"] - mixed).abs().max() > 0.1


def test_the_ends_are_the_adapters_themselves(tmp_path):
    ends = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)]
    for weights, end in (((1, 0), ends[0]), ((0, 1), ends[1])):
        made = save_interpolated(ends, weights, tmp_path / f"end-{weights[0]}")
        torch.testing.assert_close(logits(made), logits(end), rtol=1e-4, atol=1e-5)
    assert (logits(ends[0]) - logits(ends[1])).abs().max() > 0.1


def test_what_was_not_made_for_the_same_base(tmp_path):
    ours = adapter(tmp_path / "a", 1)
    deeper = adapter(tmp_path / "deeper", 1, layers=3)
    with pytest.raises(UserError, match=r"not in the same layers.*same train_layers"):
        save_interpolated([ours, deeper], (0.5, 0.5), tmp_path / "x")
    wide = adapter(tmp_path / "wide", 1, model=tiny.model(intermediate_size=48))
    with pytest.raises(UserError, match="different widths"):
        save_interpolated([ours, wide], (0.5, 0.5), tmp_path / "x")
    path = wide / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "other"}))
    with pytest.raises(UserError, match=r"and that in .* on other; give two of one base"):
        save_interpolated([ours, wide], (0.5, 0.5), tmp_path / "x")
    with pytest.raises(UserError, match="holds no adapter_config"):
        save_interpolated([ours, tmp_path], (0.5, 0.5), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_ranks_that_depend_on_the_layer_are_refused(tmp_path):
    ours = adapter(tmp_path / "a", 1)
    path = ours / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 8}}))
    with pytest.raises(UserError, match="other ranks in other layers"):
        save_interpolated([ours, ours], (0.5, 0.5), tmp_path / "x")
