"""Ways in which other trainers' kernels went wrong, each with a test that would have seen it.

Every test shows that what it guards against is visible at its sizes.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, KERNELS, place

import fastrlhf_kernels
from fastrlhf_kernels import (
    PolicyLossSpec,
    linear_logprobs,
    linear_policy_loss,
    logprobs,
    policy_loss,
)

SOURCE = Path(fastrlhf_kernels.__file__).parent
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def head(generator, n, d, v, dtype=torch.float32, scale=1.0):
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (scale * torch.randn(v, d, generator=generator)).to(dtype)
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@every_backend
def test_phantom_columns_of_the_last_tile_have_no_probability(generator, device, backend):
    """verl added e⁰ for each column between the vocabulary's end and the tile's."""
    at = place(backend, device)
    hidden, weight, targets = head(generator, 5, 8, 1003)
    truth = (hidden.double() @ weight.double().T - 30).log_softmax(-1)
    bias = torch.full((1003,), -30.0)
    out = linear_logprobs(
        hidden.to(at), weight.to(at), targets.to(at), bias=bias.to(at), backend=backend
    )
    picked = truth.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs.cpu().double(), picked, rtol=0, atol=2e-5)
    phantom = torch.cat([hidden @ weight.T - 30, torch.zeros(5, 21)], -1).log_softmax(-1)
    assert (phantom.gather(-1, targets[:, None])[:, 0] - picked).abs().min() > 1e-3


@every_backend
@pytest.mark.parametrize("level", [-200.0, -1e4])
def test_strongly_negative_logits(generator, device, backend, level):
    """verl's running maximum started at 0: every exponential underflowed, and the log was NaN."""
    at = place(backend, device)
    logits = torch.randn(4, 300, generator=generator) + level
    targets = torch.randint(0, 300, (4,), generator=generator)
    out = logprobs(logits.to(at), targets.to(at), backend=backend)
    truth = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs.cpu().double(), truth, rtol=0, atol=2e-3)
    assert not logits.exp().sum(-1).any()


@every_backend
def test_the_head_gradient_is_summed_in_float32_over_chunks(
    generator, device, backend, relative_rms
):
    """Liger (#512) and verl summed it in bfloat16, chunk by chunk."""
    at = place(backend, device)
    hidden, weight, targets = head(generator, 64, 16, 200, torch.bfloat16, 0.2)
    ones, spec = torch.ones(64), PolicyLossSpec(loss="reinforce", aggregation="constant")

    def gradient(hidden, weight, backend, at=at):
        weight = weight.to(at).requires_grad_()
        given = [x.to(at) for x in (targets, 0 * ones, ones, ones > 0)]
        out = linear_policy_loss(
            hidden.to(at), weight, *given, spec, num_items=64, workspace_mb=0.01, backend=backend
        )
        return torch.autograd.grad(out.loss, weight)[0].cpu()

    truth = gradient(hidden.double(), weight.double(), "reference", torch.device("cpu"))
    ours = relative_rms(gradient(hidden, weight, backend), truth)
    summed = torch.zeros(200, 16, dtype=torch.bfloat16)
    for row in range(64):
        one = torch.zeros(200, 16, dtype=torch.float64)
        probs = (hidden[row].double() @ weight.double().T).softmax(-1)
        probs[targets[row]] -= 1
        one = probs[:, None] * hidden[row].double() / 64
        summed += one.bfloat16()
    theirs = relative_rms(summed, truth)
    assert ours < 4e-3 < theirs / 1.5, (ours, theirs)


@every_backend
def test_entropy_has_a_gradient(generator, device, backend):
    """prime-rl's fused head asserts that nobody asks for one."""
    at = place(backend, device)
    logits = torch.randn(3, 50, generator=generator)
    ours = logits.clone().to(at).requires_grad_()
    targets = torch.zeros(3, dtype=torch.int64, device=at)
    logprobs(ours, targets, backend=backend).entropy.sum().backward()
    plain = logits.double().requires_grad_()
    torch.distributions.Categorical(logits=plain).entropy().sum().backward()
    torch.testing.assert_close(ours.grad.cpu().double(), plain.grad, rtol=1e-4, atol=1e-6)
    assert plain.grad.abs().max() > 1e-3


@every_backend
def test_logits_are_never_rounded(generator, device, backend):
    """Logits in bfloat16 are off by 0.1 nats at |z| near 45."""
    at = place(backend, device)
    hidden, weight, targets = head(generator, 6, 64, 500, torch.bfloat16)
    exact = hidden.double() @ weight.double().T
    weight = (weight * (45 / exact.abs().max())).bfloat16()
    exact = hidden.double() @ weight.double().T
    truth = exact.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    out = linear_logprobs(hidden.to(at), weight.to(at), targets.to(at), backend=backend)
    assert (out.logprobs.cpu() - truth).abs().max() <= 2e-5
    rounded = exact.bfloat16().double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert (rounded - truth).abs().max() > 1e-2


@every_backend
def test_the_kl_is_never_negative(generator, device, backend):
    """Nine threads report a negative KL: sampled estimators, or a reference that is not one."""
    at = place(backend, device)
    hidden, weight, targets = (x.to(at) for x in head(generator, 40, 8, 120))
    near = hidden + 1e-4 * torch.randn(40, 8, generator=generator).to(at)
    out = linear_logprobs(hidden, weight, targets, ref_hidden=near, backend=backend)
    own = linear_logprobs(hidden, weight, targets, ref_hidden=hidden, backend=backend)
    assert (out.kl >= 0).all() and own.kl.eq(0).all()
    ref = linear_logprobs(near, weight, targets, backend=backend)
    assert (out.logprobs - ref.logprobs).min() < 0, "k1, the sampled estimator, does go below 0"


@every_backend
def test_fused_and_composed_losses_do_not_drift_apart(generator, device, backend, relative_rms):
    """Liger's (#1082) fused and unfused losses differed, the gradient norm by a factor of 100."""
    at = place(backend, device)
    hidden, weight, targets = (x.to(at) for x in head(generator, 30, 8, 120))
    old = linear_logprobs(hidden, weight, targets, backend=backend).logprobs
    old = old + 0.3 * torch.randn(30, generator=generator).to(at)
    advantages = torch.randn(30, generator=generator).to(at)
    mask = (torch.arange(30) % 5 != 0).to(at)
    spec = PolicyLossSpec(entropy_coef=0.1, dual_clip=1.2)
    gradients = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        given = (old, advantages, mask, spec)
        if fused:
            loss = linear_policy_loss(*leaves, targets, *given, backend=backend).loss
        else:
            out = linear_logprobs(*leaves, targets, backend=backend)
            loss = policy_loss(out.logprobs, *given, entropy=out.entropy).loss
        gradients.append(torch.autograd.grad(loss, leaves))
    for x, y in zip(*gradients, strict=True):
        assert relative_rms(x.cpu(), y.cpu().double()) < 1e-5


BIG = """
import torch
from fastrlhf_kernels import logprobs
v = 151_936
buffer = torch.empty(14_200, v, dtype=torch.bfloat16, device="{device}")  # mapped, not touched
assert buffer.numel() > 2**31
logits = buffer[::14_199]
logits.copy_((torch.arange(2 * v).reshape(2, v) % 7))
truth = logits.double().log_softmax(-1)[:, -3:].cpu()
for target in (v - 1, v - 2):
    targets = torch.full((2,), target, device="{device}")
    out = logprobs(logits, targets, backend="{backend}").logprobs.cpu()
    gap = (out - truth[:, target - v]).abs().max()
    assert gap < 1e-4, gap
print("ok")
"""


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_31_bits(device, backend):
    """N·V passes 2³¹ at N = 14134 for this vocabulary. In a process of its own: it might crash."""
    done = subprocess.run(
        [sys.executable, "-c", BIG.format(backend=backend, device=place(backend, device))],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


def test_no_kernel_is_autotuned_at_run_time():
    """Timing a kernel that writes over its input runs it several times on it."""
    for path in SOURCE.glob("_triton*.py"):
        assert "autotune" not in path.read_text(), path.name


CONSTANT = re.compile(r"(?:BLOCK|HAS)_[A-Z]+|BLOCK")
STRUCTURE = {
    # what a kernel computes
    "ESTIMATOR", "HEAD", "LOSS", "NARROWED", "REFERENCE", "STOCHASTIC",
    # how: alignment, accuracy, a dtype, the codes of 8-bit numbers
    "ALIGNED", "CODED", "PRECISION", "SIGNED", "UNSIGNED", "UPCAST_DOT", "dtype",
    # pieces of a block, and tiles that share a weight
    "GROUP_M", "PARTS", "PIECES", "ROWS",
}  # fmt: skip


def recompiling(text: str) -> list[str]:
    """The constants of kernels in `text` that could follow the data, as "kernel: argument"."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        if not any("triton.jit" in ast.unparse(x) for x in node.decorator_list):
            continue
        for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            constant = x.annotation is not None and "constexpr" in ast.unparse(x.annotation)
            if constant and not (CONSTANT.fullmatch(x.arg) or x.arg in STRUCTURE):
                found.append(f"{node.name}: {x.arg}")
    return found


def test_what_changes_during_a_run_does_not_recompile():
    """Liger compiled anew for each length."""
    text = "".join(path.read_text() for path in sorted(SOURCE.glob("_triton*.py")))
    assert recompiling(text) == []
    for length in ("T", "LENGTH", "N", "num_items", "BLOCKS"):
        for decorator in ("triton.jit", "triton.jit(do_not_specialize=['n'])"):
            seeded = f"@{decorator}\ndef rows(x_ptr, {length}: tl.constexpr) -> int:\n    pass\n"
            assert recompiling(text + seeded) == [f"rows: {length}"]
    for name in STRUCTURE:
        assert f"{name}: tl.constexpr" in text, f"no kernel has {name} any more"


def second_dimension(text: str) -> list[str]:
    """The calls in `text` that ask for another grid dimension than the first."""
    calls = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Call)]
    grid = [x for x in calls if re.search(r"\b(program_id|num_programs)$", ast.unparse(x.func))]
    asked = {x: [*x.args, *(k.value for k in x.keywords)] for x in grid}
    return [ast.unparse(x) for x, axis in asked.items() if [ast.unparse(y) for y in axis] != ["0"]]


def test_grids_may_pass_65535():
    """Liger's grid had the length in its second dimension, which ends at 65,535."""
    for path in SOURCE.glob("_triton*.py"):
        assert second_dimension(path.read_text()) == [], path.name
    for call in ("program_id(1)", "program_id(axis=2)", "num_programs(1)", "program_id(AXIS)"):
        assert second_dimension(f"n = tl.{call}") == [f"tl.{call}"]
