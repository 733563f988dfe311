"""A quantised weight computes one way in every phase, and is made once for all roles of a layer."""

import builtins

import pytest
import tiny_modes
import torch
import torch.nn.functional as F
from tiny_modes import MASK, MODES, TOKENS, of_role, train

from fastrlhf import quantization
from fastrlhf.backbone import SharedBackbone
from fastrlhf.errors import UserError
from fastrlhf.pretrained import find_pretrained
from fastrlhf.quantization import (
    DequantizedLinear,
    check_quantization,
    compute_dequantized,
    is_quantized,
    layer_weights,
)

KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_modes.Scene(tmp_path_factory.mktemp("models"))


@pytest.fixture
def made(monkeypatch) -> list[torch.nn.Module]:
    """The linears whose weights are brought back, in order."""
    linears: list[torch.nn.Module] = []
    dequantize = quantization.dequantize

    def counted(linear, dtype):
        linears.append(linear)
        return dequantize(linear, dtype)

    monkeypatch.setattr(quantization, "dequantize", counted)
    return linears


def linear_of(scene, kind, dtype=torch.float32):
    model = find_pretrained(str(scene.folders[True])).load(dtype=dtype, quantization=kind)
    return model.model.layers[1].mlp.up_proj


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_linear_of_the_stored_weight(scene, kind, dtype):
    linear = linear_of(scene, kind, dtype)
    x = torch.randn(3, 5, 64, dtype=dtype)
    weight = linear.dequantized(dtype)
    original = scene.untouched(MODES["lora_top"]).model.layers[1].mlp.up_proj.weight
    # Half a step of the grid: 1/254 of a row's largest weight, 0.152 of a block's in NF4.
    step = 1 / 254 if kind == "int8" else 0.152
    bound = original.abs().max() * step + (0.01 if dtype == torch.bfloat16 else 1e-3)
    assert 0 < (weight.float() - original).abs().max() < bound
    with torch.no_grad():
        assert torch.equal(linear(x), F.linear(x, weight))
    given = x.clone().requires_grad_()
    out = linear(given)
    assert torch.equal(out, F.linear(x, weight))
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(given.grad, grad @ weight)


@pytest.mark.parametrize("shape", [(64, 32), (48, 96), (33, 33), (5, 100)])
def test_rows_that_are_not_whole_blocks(shape):
    from bitsandbytes.nn import Linear4bit

    linear = Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4")
    original = linear.weight.detach().clone()
    weight = quantization.dequantize(linear.to("cpu"), torch.float32)
    # As good as NF4 is for evenly spread weights; a block off by one gives four times that.
    assert weight.shape == original.shape
    assert (weight - original).norm() < 0.12 * original.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(scene, kind):
    linear = linear_of(scene, kind)
    x = torch.randn(4, 6, 64)
    x[2] *= 40  # int8 kernels of bitsandbytes would take this row's outlier columns for all
    with torch.no_grad():
        together = linear(x)
        torch.testing.assert_close(linear(x[:1]), together[:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_stored_as_they_were_after_use(scene, kind):
    linear = linear_of(scene, kind)
    before = linear.weight.data.clone()
    with torch.no_grad():
        linear(torch.randn(2, 3, 64, dtype=torch.bfloat16))
        linear(torch.randn(2, 1, 64))
    assert linear.weight.dtype == before.dtype and torch.equal(linear.weight.data, before)


@pytest.mark.parametrize("kind", KINDS)
def test_three_roles_bring_a_weight_back_once(scene, kind, made):
    backbone = scene.backbone(MODES[kind], critic="adapter")
    train(backbone)
    trunk = backbone.trunk(TOKENS, MASK)
    roles = ["policy", "reference", "critic"]
    made.clear()
    together = backbone.hidden_together(roles, trunk, MASK)
    # 7 linears in each of the two layers above the trunk.
    assert len(made) == len(set(made)) == 7 * 2
    made.clear()
    for role in roles:
        with torch.no_grad():
            assert torch.equal(backbone.hidden(role, trunk, MASK), together[role])
    assert len(made) == 3 * 7 * 2


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_held_after_a_layer(scene, kind):
    linear = linear_of(scene, kind)
    x = torch.randn(1, 2, 64)
    with pytest.raises(RuntimeError), layer_weights(linear), torch.no_grad():
        linear(x)
        assert linear.held is not None and linear.held.dtype == x.dtype
        raise RuntimeError
    assert linear.held is None and not linear.holding
    with torch.no_grad():
        linear(x)
    assert linear.held is None


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_the_head_and_the_embedding_are_not_quantised(scene, name):
    for tied in (True, False):
        model = find_pretrained(str(scene.folders[tied])).load(
            dtype=torch.bfloat16, quantization=name
        )
        assert is_quantized(model)
        linears = [n for n, m in model.named_modules() if isinstance(m, DequantizedLinear)]
        assert len(linears) == 7 * 4 and not any("lm_head" in n for n in linears)
        assert model.lm_head.weight.dtype == torch.bfloat16
    assert not is_quantized(scene.untouched(MODES["full"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_quantised_elsewhere_computes_the_same(scene, kind):
    from transformers import AutoModelForCausalLM

    options = quantization.loading_options(kind, device="cpu", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        scene.folders[True], dtype=torch.float32, **options
    ).eval()
    if kind == "int8":
        with torch.no_grad():
            model(TOKENS)  # bitsandbytes moves the scales
    theirs = SharedBackbone(model, lora=tiny_modes.LORA, train_layers=2)
    ours = scene.backbone(MODES[kind])
    assert torch.equal(of_role(theirs, "reference"), of_role(ours, "reference"))
    before = type(model.model.layers[0].mlp.up_proj)
    compute_dequantized(model)
    assert type(model.model.layers[0].mlp.up_proj) is before


def test_weights_that_bitsandbytes_repacked_are_refused(scene):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from transformers import AutoModelForCausalLM

    options = quantization.loading_options("nf4", device="cpu", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        scene.folders[True], dtype=torch.float32, **options
    ).eval()
    # As bitsandbytes' forward does in evaluation on a CPU with AVX512-BF16.
    weight = model.model.layers[3].mlp.up_proj.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    with pytest.raises(UserError, match="load the model anew"):
        SharedBackbone(model, lora=tiny_modes.LORA, train_layers=2)
    assert not any(isinstance(m, DequantizedLinear) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_machine_cannot_run(kind, monkeypatch):
    check_quantization(kind, device="cpu", dtype=torch.float32)
    device = "cuda" if not torch.cuda.is_available() else "xpu"
    sentence = f"{kind} does not run in .* on {device} .*: null$"
    with pytest.raises(UserError, match=sentence) as error:
        check_quantization(kind, device=device, dtype=torch.float32)
    assert "\n" not in str(error.value)
    if kind == "nf4":
        with pytest.raises(UserError, match=r"does not run in torch\.float64 .*16/32-bit"):
            check_quantization(kind, device="cpu", dtype=torch.float64)

    def without(name, *rest):
        if name.split(".")[0] == "bitsandbytes":
            raise ImportError(name)
        return imported(name, *rest)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="run: pip install bitsandbytes"):
        check_quantization(kind, device="cpu", dtype=torch.float32)


def test_a_model_is_checked_before_its_weights_are_read(scene, monkeypatch):
    found = find_pretrained(str(scene.folders[True]))
    monkeypatch.setattr("fastrlhf.pretrained.AutoModelForCausalLM", None)
    device = "cuda" if not torch.cuda.is_available() else "xpu"
    with pytest.raises(UserError, match="does not run"):
        found.load(dtype=torch.float32, device=device, quantization="nf4")
