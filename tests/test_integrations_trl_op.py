"""The op that stands in for TRL's: the same results, and a patch that leaves nothing behind."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch
from trl.trainer import utils

from fastrlhf.integrations import Package
from fastrlhf.integrations import trl as integration
from fastrlhf_kernels import reference

ORIGINAL = utils._ChunkedLogProbFunction
USES_TRITON = utils._use_triton


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()
    assert utils._ChunkedLogProbFunction is ORIGINAL
    assert utils._use_triton is USES_TRITON


OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def arguments(problem, *, outputs=OUTPUTS, softcap=20.0, scale=0.7):
    hidden, weight, bias = (
        x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)
    )
    return (hidden, weight, bias, problem.targets, 0.8, 256, softcap, scale, outputs)


def test_the_op_is_theirs(head_problem, relative_rms):
    """Every statistic and gradient, with bias, soft cap, scale and temperature, in float32."""
    problem = head_problem(29).to(torch.float32)
    # A row whose target is the argmax, so that is_top1 takes both values.
    top = (problem.hidden @ problem.weight.T + problem.bias)[0].argmax()
    problem.targets[0] = top
    given = {"theirs": arguments(problem), "ours": arguments(problem)}
    theirs = ORIGINAL.apply(*given["theirs"])
    ours = integration.ChunkedLogProbs.apply(*given["ours"])
    assert theirs[4].any() and not theirs[4].all()
    for mine, truth in zip(ours, theirs, strict=True):
        assert mine.dtype == truth.dtype
        assert mine.requires_grad == truth.requires_grad
        if truth.dtype == torch.bool:
            assert torch.equal(mine, truth)
        else:
            assert relative_rms(mine, truth) < 1e-6
    for logprobs, entropy, *_ in (theirs, ours):
        (logprobs.sum() + 0.1 * (entropy**2).sum()).backward()
    for mine, truth in zip(given["ours"][:3], given["theirs"][:3], strict=True):
        assert relative_rms(mine.grad, truth.grad) < 2e-6


@pytest.mark.parametrize("outputs", [(), ("log_probs", "entropy"), ("log_probs", "is_top1")])
def test_what_is_not_asked_for_is_none(outputs, head_problem):
    given = arguments(head_problem().to(torch.float32), outputs=outputs)
    found = [x is not None for x in integration.ChunkedLogProbs.apply(*given)]
    assert found == [x is not None for x in ORIGINAL.apply(*given)]


def test_no_rows(head_problem):
    """A microbatch without labels still reaches the model with a gradient, of zero."""
    given = arguments(head_problem().rows(slice(0, 0)).to(torch.float32))
    logprobs = integration.ChunkedLogProbs.apply(*given)[0]
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert given[0].grad.shape == given[0].shape
    assert not given[1].grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_rounds_the_operands_only(autocast, head_problem, relative_rms):
    """Against float64 of the same rounded operands; TRL's op rounds the logits as well."""
    problem = head_problem(64, 32).to(torch.bfloat16)
    given = list(arguments(problem.to(torch.float32) if autocast else problem, outputs=()))
    wide = [x.detach().double() for x in (problem.hidden, problem.weight, given[2])]
    tempered = reference.head_logits(
        *wide, torch.full((64,), 0.8, dtype=torch.float64),
        logit_scale=0.7, softcap=20.0, valid_vocab=len(wide[1]),
    )  # fmt: skip
    truth = tempered.log_softmax(-1).gather(-1, problem.targets[:, None]).squeeze(-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = integration.ChunkedLogProbs.apply(*given)[0]
        theirs = ORIGINAL.apply(*given)[0]
    assert ours.dtype == torch.float32
    assert relative_rms(ours, truth) < 1e-6
    assert relative_rms(theirs, truth) > 1e-4
    ours.sum().backward()
    assert all(x.grad.dtype == x.dtype for x in given[:3])


def test_zero_3_is_refused(head_problem):
    given = arguments(head_problem().to(torch.float32))
    given[1].ds_status = "NOT_AVAILABLE"
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        integration.ChunkedLogProbs.apply(*given)


def test_patching_twice_nesting_and_unpatching_without_patch():
    integration.unpatch()
    integration.patch()
    with integration.patch():
        assert utils._ChunkedLogProbFunction is integration.ChunkedLogProbs
    assert utils._ChunkedLogProbFunction is integration.ChunkedLogProbs, "patched before the with"
    integration.unpatch()
    assert utils._ChunkedLogProbFunction is ORIGINAL
    with pytest.raises(ZeroDivisionError), integration.patch():
        1 / 0  # noqa: B018
    assert utils._ChunkedLogProbFunction is ORIGINAL


def test_rows_without_a_label_are_left_out_where_trl_knows_the_device():
    with integration.patch():
        kinds = [utils._use_triton(torch.device(x)) for x in ("cpu", "cuda", "meta")]
    assert kinds == [True, USES_TRITON(torch.device("cuda")), False]


def test_anothers_patch_is_neither_taken_over_nor_undone(monkeypatch):
    class Foreign:
        def forward(self, hidden): ...

    integration.patch()
    with monkeypatch.context() as other:
        other.setattr(utils, "_ChunkedLogProbFunction", Foreign)
        for call in (integration.unpatch, integration.patch, integration.unpatch):
            with pytest.raises(RuntimeError, match="_ChunkedLogProbFunction was replaced by other"):
                call()
            assert utils._ChunkedLogProbFunction is Foreign
    # The other patch is undone, which puts back ours.
    assert utils._ChunkedLogProbFunction is integration.ChunkedLogProbs
    integration.unpatch()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Foreign)
    with pytest.raises(RuntimeError, match="takes \\('self', 'hidden'\\), expected"):
        integration.patch()
    monkeypatch.undo()


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "1.160.0", "2.0"])
def test_other_versions_are_refused(found, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    message = rf"found trl {found}.*1\.16\.x \(tried with 1\.16\.0\).*pip install 'trl==1\.16\.0'"
    with pytest.raises(ImportError, match=message):
        integration.patch()
    assert utils._ChunkedLogProbFunction is ORIGINAL


def test_a_missing_trainer_is_named():
    with pytest.raises(ImportError, match="nowhere is not installed; needed: nowhere"):
        Package("nowhere", series="1", tried=("1.0",)).require()


def test_importing_the_adapters_imports_no_trainer():
    script = (
        "import sys, fastrlhf.integrations.trl\n"
        "print([x for x in ('trl', 'verl', 'openrlhf', 'transformers') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
