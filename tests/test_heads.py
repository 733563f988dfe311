"""The head as sampling reads it."""

import tiny
import torch

from fastrlhf.backbone import SharedBackbone


def test_logits_for_sampling_carry_no_gradient_where_the_head_trains():
    backbone = SharedBackbone(tiny.model(), lora=None)
    assert backbone.head.weight.requires_grad
    assert not backbone.head.logits(torch.ones(2, 32, requires_grad=True)).requires_grad
