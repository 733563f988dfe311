"""What the policy owns of a family that is not in the table, and what no role needs a copy of."""

import pytest
import tiny
import tiny_families
import torch
from tiny_modes import MASK, TOKENS, of_role, train
from torch import nn

from fastrlhf.backbone import SharedBackbone
from fastrlhf.errors import UserError
from fastrlhf.families import FAMILIES
from fastrlhf.originals import names_after, top_parts


def names(slots) -> set[str]:
    return {name for _, name in slots}


def test_opt_declares_its_norm_before_its_layers_and_it_is_owned():
    model = tiny_families.unknown(num_hidden_layers=3)
    with torch.no_grad():
        model.get_decoder().final_layer_norm.weight.add_(0.1)
    with pytest.warns(UserWarning, match="run whole"):
        backbone = SharedBackbone(model, lora=None, train_layers=2, critic="adapter")
    norm = backbone.decoder.final_layer_norm.weight
    assert any(p is norm for p in backbone.trainable())
    truth = of_role(backbone, "reference")
    before = norm.detach().clone()
    train(backbone)
    assert not torch.equal(norm, before)
    assert torch.equal(of_role(backbone, "reference"), truth)


def test_a_projection_after_the_layers_is_owned_and_one_before_is_not():
    decoder = tiny_families.unknown(word_embed_proj_dim=16).train().get_decoder()
    assert names(top_parts(decoder, 1)) == {"1", "final_layer_norm", "project_out"}


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_the_table_says_what_running_says(name):
    decoder = tiny_families.model(name).get_decoder()
    family = FAMILIES[decoder.config.model_type]
    assert names_after(decoder, family.layers_of(decoder)[-1]) == [family.norm]
    assert names(top_parts(decoder, 2)) == {"2", "3", family.norm}


def test_shapes_are_enough():
    decoder = tiny_families.unknown().get_decoder()
    assert names(top_parts(decoder.to("meta"), 1)) == {"1", "final_layer_norm"}


def test_layers_that_cannot_be_found_are_refused():
    model = tiny_families.unknown()
    decoder = model.get_decoder()
    decoder.twice = nn.ModuleList(decoder.layers)
    with pytest.raises(UserError, match="train adapters"):
        SharedBackbone(model, lora=None, train_layers=1)


@pytest.mark.parametrize("reference", [True, False])
def test_the_head_is_copied_for_a_reference_alone(reference):
    model = tiny.model(tie_word_embeddings=False)
    backbone = SharedBackbone(
        model, lora=None, train_layers=1, reference=reference, critic="adapter"
    )
    assert (backbone.base.output is not None) == reference
    trunk = backbone.trunk(TOKENS, MASK)
    backbone.hidden("critic", trunk, MASK)
