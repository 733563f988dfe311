"""AdamW with 8-bit moments: its maps, its backends' bits, its rounding, and what it learns."""

import copy

import pytest
import torch
from safetensors.torch import load, save

from fastrlhf_kernels import AdamW8bit, _cpu
from fastrlhf_kernels import _reference_adamw8bit as reference
from fastrlhf_kernels._reference_adamw8bit import dequantize, dynamic_map, quantize

needs_csrc = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")
KERNELS = [
    pytest.param("cpu", marks=needs_csrc),
    pytest.param("triton", marks=pytest.mark.interpret),
]
BACKENDS = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(n, steps, dtype=torch.float32):
    """Of magnitudes that span four decades."""
    scales = 10 ** (-4 * torch.rand(n, generator=torch.Generator().manual_seed(9)))
    return [(normal(n, seed=100 + t) * scales).to(dtype) for t in range(steps)]


def run(start, grads, *, backend="auto", optimizer=None, **options):
    """The parameter and the optimizer after a step for each gradient."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = AdamW8bit([parameter], **{"lr": 1e-2, **options}, backend=backend)
    return proceed(parameter, optimizer, grads), optimizer


def proceed(parameter, optimizer, grads):
    for g in grads:
        parameter.grad_dtype = g.dtype
        parameter.grad = g.to(parameter.device)
        optimizer.step()
    return parameter.detach()


def tensors(optimizer):
    return optimizer.state_dict()["state"][0]


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_those_of_bitsandbytes(signed):
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(dynamic_map(signed), create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_gets_its_nearest_code(signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(100_000, generator=generator),
                   10 ** (-8 * torch.rand(155_000, generator=generator))])  # fmt: skip
    if signed:
        x = x * torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1, 1)
    # Every block holds a 1, which makes its scale 1.
    x = torch.nn.functional.pad(x.reshape(-1, 255), (0, 1), value=1.0).reshape(-1)
    codes, scale = quantize(x, signed=signed)
    assert scale.eq(1).all()
    values = dynamic_map(signed).double()
    nearest = torch.bucketize(x.double(), (values[1:] + values[:-1]) / 2)
    if not signed:
        assert codes[x > 0].min() == 1
        nearest = nearest.clamp(min=1).where(x > 0, 0)
    excess = (values[codes.int()] - x).abs() - (values[nearest] - x).abs()
    # A number halfway between two codes may go to either, as far as float32 knows it.
    assert (excess / x.abs()).max() < 3e-7
    moved = (values[(codes.int() + 1).clamp(max=255)] - x).abs() - (values[nearest] - x).abs()
    assert (moved / x.abs()).max() > 3e-7


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_read_back_as_they_were_written(signed):
    codes = torch.arange(256, dtype=torch.uint8)
    x = dequantize(codes, torch.tensor([3.0]), signed=signed)
    again, scale = quantize(x, signed=signed)
    assert torch.equal(again, codes) and scale.tolist() == [3.0]


# 5007 ends in a ragged block and in a ragged Triton program; 300 keeps float32 moments.
@pytest.mark.parametrize("size", [5007, 300])
@pytest.mark.parametrize("gradient", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_all_backends_give_the_same_bits(backend, dtype, gradient, size, device):
    start = normal(size).to(dtype)
    grads = gradients(size, 3, dtype if gradient == "same" else torch.float32)
    expected, optimizer = run(start, grads, backend="reference")
    where = device if backend == "triton" else torch.device("cpu")
    got, other = run(start.to(where), grads, backend=backend)
    assert torch.equal(got.cpu(), expected)
    assert tensors(other).keys() == tensors(optimizer).keys()
    for name, x in tensors(optimizer).items():
        assert torch.equal(tensors(other)[name].cpu(), x), name
    plain, _ = run(start, grads, backend="reference", seed=1)
    assert torch.equal(plain, expected) == (dtype != torch.bfloat16)


def test_the_first_step_is_that_of_bitsandbytes():
    import bitsandbytes

    start, gradient = normal(64 * 256), normal(64 * 256, seed=1)
    theirs = torch.nn.Parameter(start.clone())
    their_optimizer = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=1e-2)
    proceed(theirs, their_optimizer, [gradient])
    ours, optimizer = run(start, [gradient])
    torch.testing.assert_close(ours, theirs.detach(), rtol=2e-7, atol=2e-7)
    own, other = tensors(optimizer), their_optimizer.state[theirs]
    for name, key, signed in (("exp_avg", 1, True), ("exp_avg_sq", 2, False)):
        scale = own[f"{name}_scale"]
        torch.testing.assert_close(scale, other[f"absmax{key}"], rtol=1e-6, atol=0)
        same = own[name] == other[f"state{key}"]
        # Theirs looks codes up from a rounded number on a CPU, so a few are not the nearest, and
        # second moments that they take for 0 have our smallest code.
        assert (same | (other[f"state{key}"] == 0)).float().mean() > 0.95
        exact = gradient * 0.1 if signed else gradient.square() * 1e-3
        our_error, their_error = (
            (dequantize(codes, scale, signed=signed) - exact).abs().mean()
            for codes in (own[name], other[f"state{key}"])
        )
        assert our_error <= their_error * 1.001


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_tensors_follow_torch(backend, device):
    where = device if backend == "triton" else torch.device("cpu")
    start, grads = normal(300), gradients(300, 20)
    got, optimizer = run(start.to(where), grads, backend=backend, weight_decay=0.1)
    theirs = torch.nn.Parameter(start.clone())
    proceed(theirs, torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1), grads)
    torch.testing.assert_close(got.cpu(), theirs.detach(), rtol=0, atol=1e-6)
    assert tensors(optimizer)["exp_avg"].dtype == torch.float32


def fit(make, steps=300):
    """The loss of a least-squares problem with 64 × 128 unknowns."""
    inputs, target = normal(512, 64, seed=1), normal(512, 128, seed=2)
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make([weight])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (inputs @ weight - target).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_it_converges_like_adamw_with_float32_moments():
    inputs, target = normal(512, 64, seed=1), normal(512, 128, seed=2)
    best = float((inputs @ torch.linalg.lstsq(inputs, target).solution - target).square().mean())
    theirs = fit(lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.0)) - best
    ours = fit(lambda p: AdamW8bit(p, lr=5e-3, weight_decay=0.0)) - best
    start = fit(lambda p: AdamW8bit(p, lr=0.0)) - best
    assert theirs < 0.01 * start and ours < 0.01 * start


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    # Three eighths of the way from 1 to the next number, which is 1 + 2^-7.
    x = torch.full((100_000,), 1 + 3 / 1024)
    bits = reference.random_bits(reference.rounding_key(0, 1, 0), x.numel(), x.device)
    rounded = reference.round_stochastically(x, bits).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    # Five standard deviations of the share.
    assert abs((rounded > 1).float().mean() - 0.375) < 0.008
    assert abs((reference.round_stochastically(-x, bits).float() + x).mean()) < 0.008 * 2**-7
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.5])
    got = reference.round_stochastically(special, bits[:5]).float()
    torch.testing.assert_close(got, special, rtol=0, atol=0, equal_nan=True)


def test_rounding_bits_are_uniform_and_differ_between_tensors_steps_and_seeds():
    seen = []
    for key in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)):
        bits = reference.random_bits(reference.rounding_key(*key), 1 << 18, torch.device("cpu"))
        shares = torch.bincount(bits & 0xFF, minlength=256)
        # The chi-square of 255 degrees of freedom is 255 ± 23.
        assert ((shares - 1024.0).square() / 1024).sum() < 370
        seen.append(bits & 0xFFFF)
    for i, one in enumerate(seen):
        for other in seen[:i]:
            correlation = torch.corrcoef(torch.stack([one, other]).double())[0, 1]
            assert abs(correlation) < 0.01
        assert abs(torch.corrcoef(torch.stack([one[1:], one[:-1]]).double())[0, 1]) < 0.01


def test_bfloat16_learns_at_1e_6_only_with_stochastic_rounding():
    start = normal(1 << 16).abs().add(0.5).to(torch.bfloat16)
    grads = [torch.ones(1 << 16, dtype=torch.bfloat16)] * 50
    options = {"lr": 1e-6, "weight_decay": 0.0}
    still, _ = run(start, grads, stochastic_rounding=False, **options)
    assert torch.equal(still, start)
    moved, _ = run(start, grads, **options)
    # Fifty steps of 1e-6; a number moves by 0 or by some 2^-8, so the mean is off by some 2 %.
    mean = float((moved.double() - start.double()).mean())
    assert mean == pytest.approx(-50e-6, rel=0.15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_seed_gives_the_same_bits_and_a_resumed_run_continues(dtype):
    grads = gradients(5007, 6, dtype)
    start = normal(5007).to(dtype)
    whole, optimizer = run(start, grads, seed=7)
    assert torch.equal(run(start, grads, seed=7)[0], whole)
    half, first = run(start, grads[:3], seed=7)
    saved = first.state_dict()
    # Through safetensors, which takes plain tensors only.
    saved["state"][0] = load(save(saved["state"][0]))
    parameter = torch.nn.Parameter(half.clone())
    resumed = AdamW8bit([parameter])
    resumed.load_state_dict(saved)
    assert torch.equal(proceed(parameter, resumed, grads[3:]), whole)
    for name, x in tensors(optimizer).items():
        assert torch.equal(tensors(resumed)[name], x) and tensors(resumed)[name].dtype == x.dtype
    # What was loaded is a copy.
    assert int(saved["state"][0]["step"]) == 3


def test_a_copied_optimizer_keeps_its_state():
    _, optimizer = run(normal(5007), gradients(5007, 2))
    twin = copy.deepcopy(optimizer)
    (parameter,) = twin.param_groups[0]["params"]
    proceed(parameter, twin, gradients(5007, 1))
    assert int(tensors(twin)["step"]) == 3 and int(tensors(optimizer)["step"]) == 2


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_gradient_shows(backend, bad, device):
    where = device if backend == "triton" else torch.device("cpu")
    grads = gradients(5000, 2)
    grads[0][1000] = bad
    once, _ = run(normal(5000).to(where), grads[:1], backend=backend)
    assert once.cpu().isnan().nonzero().tolist() == [[1000]]
    twice, _ = run(normal(5000).to(where), grads, backend=backend)
    # Its block of 256 has lost its scale.
    assert twice.cpu().isnan().nonzero().flatten().tolist() == list(range(768, 1024))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_second_moment_does_not_vanish_below_its_first_moment(backend, device):
    where = device if backend == "triton" else torch.device("cpu")
    gradient, later = torch.ones(4096), torch.ones(4096)
    gradient[1], later[1] = 1e-4, 0.0
    start = torch.zeros(4096, device=where)
    moved, optimizer = run(start, [gradient, later], backend=backend, weight_decay=0.0)
    assert int(tensors(optimizer)["exp_avg_sq"][1]) == 1
    # A first moment over eps alone would be a step of about 4700 times lr.
    assert moved[1].abs() < 2 * 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradients_and_subnormal_moments_leave_finite_numbers(backend, device):
    where = device if backend == "triton" else torch.device("cpu")
    start = normal(4096)
    for size in (0.0, 1e-20, 1e-38):
        moved, _ = run(
            start.to(where), [torch.full((4096,), size)] * 2, backend=backend, weight_decay=0.0
        )
        torch.testing.assert_close(moved.cpu(), start, rtol=0, atol=1e-6)


def test_layouts_groups_and_missing_gradients():
    start, gradient = normal(64, 128), normal(64, 128, seed=1)
    dense, transposed = (torch.nn.Parameter(x) for x in (start.clone(), start.T.clone().T))
    frozen = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [dense], "lr": 1e-3}, {"params": [frozen, transposed]}]
    optimizer = AdamW8bit(groups, lr=1e-2)
    dense.grad, transposed.grad = gradient.clone(), gradient.T.clone().T
    before = transposed.data_ptr()
    assert optimizer.step(lambda: 5.0) == 5.0
    assert transposed.data_ptr() == before and frozen.eq(1).all()
    alone, _ = run(start, [gradient], lr=1e-3)
    assert torch.equal(dense.detach(), alone)
    alone, _ = run(start, [gradient], lr=1e-2)
    assert torch.equal(transposed.detach(), alone)
    assert frozen not in optimizer.state


def test_bad_input_raises():
    for options in (
        {"lr": -1.0}, {"lr": float("nan")}, {"eps": -1.0}, {"betas": (1.0, 0.9)},
        {"weight_decay": -0.1}, {"backend": "cuda"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="allowed are"):
            AdamW8bit([torch.nn.Parameter(torch.ones(3))], **options)
    sparse = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        run(torch.ones(3), [sparse])
    with pytest.raises(ValueError, match="float64"):
        run(torch.ones(3, dtype=torch.float64), [torch.ones(3, dtype=torch.float64)])
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW8bit([parameter])
    parameter.grad_dtype = torch.bfloat16
    parameter.grad = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        optimizer.step()
