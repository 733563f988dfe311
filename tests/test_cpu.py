"""The compiled CPU kernels: threads, tiles, columns that do not exist, bfloat16 products."""

import pytest
import torch

from fastrlhf_kernels import (
    PolicyLossSpec,
    _cpu,
    linear_logprobs,
    linear_policy_loss,
    logprobs,
    policy_loss,
    value_loss,
    whiten,
)

pytestmark = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")


def test_row_kernels_give_the_same_bits_on_one_thread_and_on_two():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 41, 4099, generator=generator)
    targets = torch.randint(0, 4099, (41,), generator=generator)
    temperature, coefficients = torch.linspace(0.5, 2, 41), torch.randn(41, 3, generator=generator)
    kept = torch.arange(0, 41, 3)
    threads, results = torch.get_num_threads(), []
    options = {"logit_scale": 1.0, "softcap": 20.0, "reverse": False}
    for count in (1, 2):
        try:
            torch.set_num_threads(count)
            z, ref, table = logits.clone(), ref_logits.clone(), torch.full((41, 8), torch.nan)
            states, extras = _cpu.row_states(41).fill_(255), torch.full((41, 3), torch.nan)
            tiles = [
                _cpu.Tile(z[:, x : x + 2048], ref[:, x : x + 2048], x, 4099)
                for x in range(0, 4099, 2048)
            ]
            for tile in tiles:
                _cpu.row_statistics(
                    tile, targets, None, None, temperature, states, table, extras, **options
                )
            for tile in tiles:
                _cpu.row_gradient(tile, targets, temperature, table, coefficients, **options)
            whole = z.clone()
            _cpu.compact_rows(z, kept)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(z[: kept.numel()], whole[kept])
        results.append((table, whole, extras))
    for one, two in zip(*results, strict=True):
        assert one.isfinite().all() and torch.equal(one, two)


def test_the_first_of_equal_logits_is_the_top_one():
    weight = torch.zeros(2500, 1)
    weight[[1100, 1300, 2400]] = 1.0
    targets = torch.tensor([0, 1100, 1300, 2400])
    hidden = torch.ones(4, 1)
    for mb in (0.2, None):
        out = linear_logprobs(
            hidden, weight, targets, stats=("is_top1",), workspace_mb=mb, backend="cpu"
        )
        assert out.extra["is_top1"].tolist() == [False, True, False, False]
    out = linear_logprobs(-hidden, weight, targets, stats=("is_top1",), backend="cpu")
    assert out.extra["is_top1"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_heads_gradient_where_the_target_does_not_exist(softcap):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (3, 2100))
    targets, bias = torch.tensor([0, 30, 2080]), torch.zeros(2100)
    bias[7:2060] = -torch.inf
    grads = []
    for backend in ("reference", "cpu"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = linear_logprobs(
            *leaves, targets, bias=bias, ref_hidden=hidden + 0.1, ref_weight=weight,
            ref_bias=torch.zeros(2100), softcap=softcap, backend=backend,
        )  # fmt: skip
        assert softcap or out.logprobs[1] == -torch.inf
        grads.append(torch.autograd.grad((out.logprobs + out.entropy).sum(), leaves))
    for x, y in zip(*grads, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    not (_cpu.available() and _cpu._csrc.has_bfloat16_products()),
    reason="the CPU does not multiply bfloat16",
)
# Less than a vector, ragged panels, rows left over from blocks of six,
# several sums along the depth.
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 1, 2), (5, 15, 16), (6, 64, 256), (7, 65, 258), (13, 200, 900), (11, 127, 514)],
)
def test_bfloat16_products_have_float32_sums(relative_rms, rows, columns, depth):
    generator = torch.Generator().manual_seed(rows)
    left = torch.randn(rows, depth, generator=generator).bfloat16()
    right = torch.randn(columns, depth, generator=generator).bfloat16()
    packed, wide = _cpu.packed_columns(columns, depth), torch.full((rows, columns + 3), torch.nan)
    assert _cpu.multiplies_bfloat16(left, right)
    out = wide[:, :columns]
    _cpu.bfloat16_product(left, right, out, packed)
    assert wide[:, columns:].isnan().all()
    truth = left.double() @ right.double().t()
    eager = left.float() @ right.float().t()
    assert relative_rms(out, truth) <= relative_rms(eager, truth) + 1e-7
    assert relative_rms((left @ right.t()).float(), truth) > 1e-4  # rounded logits
    again = torch.empty(rows, columns)
    _cpu.bfloat16_product(left, right, again, packed)
    assert torch.equal(again, out)
    # A masked or broken row stays with itself.
    left[0, 0] = torch.nan
    _cpu.bfloat16_product(left, right, again, packed)
    assert again[0].isnan().all() and torch.equal(again[1:], out[1:])
    assert not _cpu.multiplies_bfloat16(left[:, 1:], right[:, 1:])
    assert not _cpu.multiplies_bfloat16(left.float(), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_gradient_where_the_target_does_not_exist(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (3 * torch.randn(2, 3, 1003, generator=generator)).to(dtype)
    targets = torch.tensor([0, 5, 1002])
    logits[1:, 5], ref_logits[:, 7] = -torch.inf, -torch.inf
    logits[:, 7] = -torch.inf
    grads = []
    for backend in ("reference", "cpu"):
        leaf = logits.clone().requires_grad_()
        out = logprobs(leaf, targets, ref_logits=ref_logits, temperature=0.7, backend=backend)
        assert out.logprobs[1] == -torch.inf
        grads.append(torch.autograd.grad((out.logprobs + out.entropy + out.kl).sum(), leaf)[0])
    assert all(x.isfinite().all() for x in grads)
    torch.testing.assert_close(*grads, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_an_infinite_kl_that_no_loss_uses(direction):
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 3, 1003, generator=generator)
    targets, grads = torch.tensor([0, 5, 1002]), []
    ref_logits[:, 7] = -torch.inf
    for backend in ("reference", "cpu"):
        leaf = logits.clone().requires_grad_()
        out = logprobs(
            leaf, targets, ref_logits=ref_logits, kl_direction=direction, backend=backend
        )
        loss = out.logprobs.sum()
        if direction == "forward":
            assert out.kl.isinf().all()
        else:
            loss = loss + out.kl.sum()  # finite: the reference never picks the column
        grads.append(torch.autograd.grad(loss, leaf)[0])
        assert grads[-1].isfinite().all()
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_head_whose_infinite_kl_no_loss_uses(head_problem, direction):
    p, grads = head_problem().to(torch.float32), []
    ref_bias = p.ref_bias.index_fill(0, torch.tensor([7]), -torch.inf)
    spec = PolicyLossSpec(kl_coef=0.0 if direction == "forward" else 0.1, cliprange_high=9.0)
    for backend in ("reference", "cpu"):
        leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
        out = linear_policy_loss(
            *leaves[:2], p.targets, p.old_logprobs, p.advantages, p.mask, spec, bias=leaves[2],
            ref_hidden=p.ref_hidden, ref_weight=p.ref_weight, ref_bias=ref_bias,
            kl_direction=direction, backend=backend,
        )  # fmt: skip
        assert out.loss.isfinite() and out.stats.kl.isinf() == (direction == "forward")
        grads.append(torch.autograd.grad(out.loss, leaves))
    for x, y in zip(*grads, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-6)


def test_a_mask_of_any_bytes():
    x, old, advantages = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    odd = (torch.arange(70) % 3 * 2).to(torch.uint8).view(torch.bool)
    spec, found = PolicyLossSpec(cliprange_high=9.0), []
    for mask in (odd, torch.arange(70) % 3 != 0):
        leaf = x.clone().requires_grad_()
        losses = (
            policy_loss(leaf, old, advantages, mask, spec, num_items=46, backend="cpu").loss,
            value_loss(
                leaf, old, advantages, mask, cliprange_value=0.2, num_items=46, backend="cpu"
            ).loss,
        )
        grads = [torch.autograd.grad(loss, leaf)[0] for loss in losses]
        found.append((*losses, *grads, whiten(x, mask, backend="cpu")))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("vocab", [1, 31, 33, 4097, 9001])  # a tail, a whole block, several
def test_bfloat16_rows_are_summed_once(vocab):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, vocab, generator=generator).mul_(20).bfloat16()
    # The maximum rises by more than e^x bears.
    logits[0] += torch.linspace(0, 300, vocab).bfloat16()
    logits[1] -= 5000
    targets = torch.randint(0, vocab, (4,), generator=generator)
    found = logprobs(logits, targets, backend="cpu")
    truth = logits.double().log_softmax(-1)
    expected = truth.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    entropy = -(truth.exp() * truth).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    logits[2, 0], logits[3, vocab - 1] = float("nan"), -float("nan")
    assert logprobs(logits, targets, backend="cpu").entropy.isnan().tolist() == [
        False, False, True, True,
    ]  # fmt: skip
