"""The fused layer computes what PEFT's does, keeps less, and steps aside where it cannot."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F

from fastrlhf import lora_linear
from fastrlhf.lora_linear import FusedLoraLinear, LoraProduct, fuse
from fastrlhf.rollout.steps import few_row_products


def make_layer(dtype=torch.float64, bias=True, **settings) -> lora.Linear:
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(6, 5, bias=bias, dtype=dtype)})
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["linear"], **settings)
    inject_adapter_in_model(config, model)
    layer = model["linear"]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def outputs(layer, x):
    """The result and every gradient."""
    x = x.clone().requires_grad_()
    result = layer(x)
    weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return result, *torch.autograd.grad((result * weights).sum(), (x, down, up))


def fused(layer):
    fuse([layer])
    assert isinstance(layer, FusedLoraLinear)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 6), (7, 6)])
def test_it_is_pefts_layer_in_float64(bias, shape):
    layer, x = make_layer(bias=bias), torch.randn(*shape, dtype=torch.float64)
    theirs = outputs(layer, x)
    for ours, expected in zip(outputs(fused(layer), x), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_its_gradient_is_that_of_its_forward():
    layer = make_layer()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def product(x, down, up):
        base = layer.get_base_layer()
        return LoraProduct.apply(x, base.weight.detach(), base.bias.detach(), down, up, 4.0)

    assert torch.autograd.gradcheck(product, (x, down, up))


def test_an_adapter_in_float32_on_a_bfloat16_base_is_rounded_as_pefts_is():
    layer, x = make_layer(torch.bfloat16), torch.randn(9, 6, dtype=torch.bfloat16)
    layer.lora_A.float()
    layer.lora_B.float()
    theirs = outputs(layer, x)
    ours = outputs(fused(layer), x)
    assert [one.dtype for one in ours] == [one.dtype for one in theirs]
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-2, atol=2e-2)


def test_it_keeps_the_input_as_it_came():
    layer, x = make_layer(torch.bfloat16), torch.randn(64, 6, dtype=torch.bfloat16)
    layer.lora_A.float()
    layer.lora_B.float()

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
            layer(x.requires_grad_())
        return sum(t.nbytes for t in sizes if t.shape[0] == len(x))

    theirs = kept()
    fused(layer)
    # x in bfloat16 and x·Aᵀ in float32, where PEFT keeps a float32 copy of x as well.
    assert kept() == x.nbytes + len(x) * 3 * 4 < theirs


def test_scoring_and_update_compute_the_same_bits():
    layer, x = fused(make_layer(torch.float32)), torch.randn(33, 6)
    with torch.no_grad():
        scored = layer(x)
    assert torch.equal(scored, layer(x.requires_grad_()))


def test_without_an_adapter_it_is_the_base_to_the_bit():
    layer, x = fused(make_layer(torch.float32)), torch.randn(33, 6)
    layer._disable_adapters = True
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_it_steps_aside(monkeypatch):
    x = torch.randn(4, 6)
    called = []
    monkeypatch.setattr(LoraProduct, "apply", lambda *given: called.append(given))
    dropping = fused(make_layer(torch.float32, lora_dropout=0.5)).train()
    dropping(x)
    sampling = fused(make_layer(torch.float32))
    sampling.get_base_layer().forward = lambda x: torch.zeros(len(x), 5)
    sampling(x)
    two = fused(make_layer(torch.float32))
    two.update_layer("other", 3, lora_alpha=12, config=LoraConfig(r=3, target_modules=["linear"]))
    two._active_adapter = ["default", "other"]
    two(x)
    assert not called
    two._active_adapter = ["other"]
    two(x)
    assert len(called) == 1


def wide_layer(**settings):
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(80, 30)})
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["linear"], **settings), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, fused(model["linear"])


@pytest.mark.parametrize("rows", [4, 24])
@torch.no_grad()
def test_a_decoding_step_has_a_product_of_its_own(rows, monkeypatch):
    (model, layer), x = wide_layer(), torch.randn(rows, 80)
    expected, called = layer(x), []
    product = lora_linear.few_rows_lora
    monkeypatch.setattr(lora_linear, "few_rows_lora", lambda *x: called.append(1) or product(*x))
    layer(x)
    assert not called, "scoring's bits are the update's"
    with few_row_products(model):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    assert len(called) == 1
    assert torch.equal(layer(x), expected) and not any(
        "forward" in vars(m) for m in model.modules()
    )


@torch.no_grad()
def test_a_decoding_step_is_pefts_where_it_is_not_one_adapter():
    (model, layer), x = wide_layer(), torch.randn(24, 80)
    layer.update_layer("other", 3, lora_alpha=12, config=LoraConfig(r=3, target_modules=["linear"]))
    layer._active_adapter = ["default", "other"]
    layer.lora_B["other"].weight.normal_()
    expected = layer(x)
    with few_row_products(model):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
        layer._disable_adapters = True
        base = layer.get_base_layer()
        torch.testing.assert_close(layer(x), F.linear(x, base.weight, base.bias))


@torch.no_grad()
def test_a_base_with_a_forward_of_its_own_keeps_it_while_sampling():
    (model, layer), x = wide_layer(), torch.randn(24, 80)
    layer.get_base_layer().forward = lambda x: torch.zeros(len(x), 30)
    low = F.linear(F.linear(x, layer.lora_A["default"].weight), layer.lora_B["default"].weight)
    with few_row_products(model):
        expected = layer.scaling["default"] * low
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def test_other_layers_are_left_alone():
    class Other(nn.Linear):
        pass

    layer = make_layer(torch.float32)
    layer.base_layer.__class__ = Other
    fuse([layer])
    assert type(layer) is lora.Linear
