"""The audit catches an eager head and passes ours."""

import pytest
import torch

from fastrlhf_kernels import (
    PolicyLossSpec,
    VocabTensorError,
    _cpu,
    forbid_vocab_tensors,
    linear_logprobs,
    linear_policy_loss,
    sample,
)

N, D, V = 300, 8, 4099
EAGER_BYTES = N * V * 4
BUDGET = 2**20


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


def test_an_eager_head_is_caught(head):
    hidden, weight, targets = head
    with pytest.raises(VocabTensorError, match=r"\[300, 4099\]"):  # noqa: SIM117 - the outer sees it
        with forbid_vocab_tensors(BUDGET, vocab_sizes={V}, exempt=[weight]):
            (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])


def test_the_reference_is_caught_and_measured(head):
    hidden, weight, targets = head
    with forbid_vocab_tensors(2 * EAGER_BYTES, vocab_sizes={V}, exempt=[weight]) as audit:
        linear_logprobs(hidden, weight, targets, backend="reference").logprobs.sum().backward()
    assert audit.largest_bytes == EAGER_BYTES


class Hider(torch.autograd.Function):
    """Makes an [N, V] tensor in its backward only."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.zeros(N, V).sum()


def test_a_backward_is_seen_too():
    x = torch.zeros(3, requires_grad=True)
    with forbid_vocab_tensors(BUDGET, vocab_sizes={V}):
        loss = Hider.apply(x).sum()
        with pytest.raises(VocabTensorError):
            loss.backward()


def test_views_in_place_results_and_exempt_shapes_pass():
    big = torch.zeros(N, V)
    parameter = torch.zeros(V, N)
    with forbid_vocab_tensors(0, vocab_sizes={V}, exempt=[parameter]) as audit:
        big[1:].t().add_(1)
        torch.mm(torch.zeros(N, D), torch.zeros(D, 7), out=big[:, :7])
        torch.zeros_like(parameter)
        parameter.t().clone()
    assert audit.largest_bytes == 0


@pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_stays_in_its_workspace(head, dtype):
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in head[:2])
    targets = head[2]
    old = torch.full((N,), -8.0)
    mask = torch.ones(N, dtype=torch.bool)
    reference = {"ref_hidden": hidden.detach() + 0.1, "ref_weight": weight.detach()}
    options = {"workspace_mb": 1, "backend": "cpu", **reference}
    spec = PolicyLossSpec(kl_coef=0.1, entropy_coef=0.01)
    with forbid_vocab_tensors(BUDGET, vocab_sizes={V}, exempt=[weight]) as audit:
        linear_policy_loss(
            hidden, weight, targets, old, torch.ones(N), mask, spec, **options
        ).loss.backward()
        out = linear_logprobs(hidden, weight, targets, **options)
        (out.logprobs + out.entropy + out.kl).sum().backward()
        sample(torch.zeros(4, V), temperature=1.0, backend="cpu")
    assert 0 < audit.largest_bytes <= BUDGET // 2
