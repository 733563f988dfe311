"""What the ops refuse at their border, with the shapes in the message."""

import pytest
import torch

from fastrlhf_kernels import PolicyLossSpec, _cpu, linear_logprobs, linear_policy_loss, logprobs

cpu_only = pytest.mark.skipif(not _cpu.available(), reason="built without a C++ compiler")

LOGPROBS = {
    "rank": (lambda p: {"hidden": p.hidden[0]}, r"hidden \[16\]"),
    "rows": (lambda p: {"targets": p.targets[1:]}, r"targets \[12\]"),
    "width": (lambda p: {"weight": p.weight[:, 1:]}, r"weight \[1003, 15\]"),
    "bias": (lambda p: {"bias": p.bias[1:]}, r"bias \[1002\]"),
    "integers": (lambda p: {"targets": p.targets.int()}, "int64"),
    "float8": (
        lambda p: {"weight": p.weight.to(torch.float8_e4m3fn)}, r"weight \[1003, 16\] float8",
    ),
    "float8 hidden": (
        lambda p: {"hidden": p.hidden.to(torch.float8_e5m2)}, r"hidden \[13, 16\] float8",
    ),
    "integer bias": (lambda p: {"bias": p.bias.int()}, r"bias \[1003\] int32"),
    "float8 ref": (
        lambda p: {"ref_hidden": p.hidden, "ref_weight": p.weight.to(torch.float8_e4m3fn)},
        r"are float32.*ref_weight \[1003, 16\] float8",
    ),
    "integer ref bias": (
        lambda p: {"ref_hidden": p.hidden, "ref_weight": p.weight, "ref_bias": p.bias.long()},
        r"are float32.*ref_bias \[1003\] int64",
    ),
    "too large": (lambda p: {"targets": p.targets * 0 + 1003}, r"1003 of row 0 is outside"),
    "negative": (lambda p: {"targets": p.targets * 0 - 1}, r"-1 of row 0"),
    "beyond valid": (lambda p: {"targets": p.targets * 0 + 950, "valid_vocab": 950}, r"\[0, 950\)"),
    "temperature 0": (lambda p: {"temperature": 0.0}, "temperature"),
    "temperature NaN": (lambda p: {"temperature": float("nan")}, "temperature"),
    "temperatures": (lambda p: {"temperature": torch.ones(5)}, r"temperature \[5\]"),
    "one bad temperature": (lambda p: {"temperature": torch.arange(13.0)}, r"temperature \[13\]"),
    "softcap": (lambda p: {"softcap": 0.0}, "softcap"),
    "direction": (lambda p: {"kl_direction": "backward"}, "forward, reverse"),
    "valid_vocab": (lambda p: {"valid_vocab": 1004}, "valid_vocab"),
    "statistic": (lambda p: {"stats": ("top5",)}, "mean_logits"),
    "workspace": (lambda p: {"workspace_mb": 0}, "workspace_mb"),
    "lone ref_weight": (lambda p: {"ref_weight": p.weight}, "ref_hidden"),
    "ref rows": (lambda p: {"ref_hidden": p.hidden[1:]}, r"ref_hidden \[12, 16\]"),
    "ref head": (
        lambda p: {"ref_hidden": p.hidden, "ref_weight": p.weight[1:]}, r"ref_weight \[1002, 16\]",
    ),
    "moving head": (
        lambda p: {"ref_hidden": p.hidden, "weight": p.weight.clone().requires_grad_()}, "moving",
    ),
    "devices": (lambda p: {"bias": p.bias.to("meta")}, "on meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOGPROBS)
def test_linear_logprobs(head_problem, case):
    p = head_problem().to(torch.float32)
    change, says = LOGPROBS[case]
    given = {"hidden": p.hidden, "weight": p.weight, "targets": p.targets, **change(p)}
    with pytest.raises(ValueError, match=says):
        linear_logprobs(**given)


LOGITS = {
    "rank": (lambda z, t: {"logits": z[0]}, r"logits \[1003\]"),
    "rows": (lambda z, t: {"targets": t[1:]}, r"targets \[12\]"),
    "no columns": (lambda z, t: {"logits": z[:, :0]}, r"logits \[13, 0\]"),
    "integers": (lambda z, t: {"targets": t.int()}, r"int64.*targets \[13\] int32"),
    "type": (lambda z, t: {"logits": z.long()}, r"logits \[13, 1003\] int64"),
    "ref": (lambda z, t: {"ref_logits": z[:, 1:]}, r"ref_logits \[13, 1002\]"),
    "too large": (lambda z, t: {"targets": t * 0 + 1003}, r"1003 of row 0 is outside"),
    "negative": (lambda z, t: {"ignore_index": -1}, r"-100 of row 1 .*targets \[13\]"),
    "beyond valid": (lambda z, t: {"targets": t * 0 + 950, "valid_vocab": 950}, r"\[0, 950\)"),
    "valid_vocab": (lambda z, t: {"valid_vocab": 1004}, r"valid_vocab=1004.*\[13, 1003\]"),
    "temperature": (lambda z, t: {"temperature": 0.0}, "temperature"),
    "temperatures": (lambda z, t: {"temperature": torch.ones(5)}, r"temperature \[5\]"),
    "direction": (lambda z, t: {"kl_direction": "backward"}, "forward, reverse"),
    "devices": (lambda z, t: {"ref_logits": z.to("meta")}, "on meta"),
    "backend": (lambda z, t: {"backend": "cuda"}, "allowed are auto"),
    "float64": (lambda z, t: {"logits": z.double(), "backend": "cpu"}, "float64 has 'reference'"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOGITS)
def test_logprobs(case):
    logits, targets = torch.randn(13, 1003), torch.arange(13)
    targets[1] = -100
    change, says = LOGITS[case]
    with pytest.raises(ValueError, match=says):
        logprobs(**{"logits": logits, "targets": targets, **change(logits, targets)})


POLICY_LOSS = {
    "shape": (lambda p: {"old_logprobs": p.old_logprobs[1:]}, r"old_logprobs \[12\]"),
    "mask": (lambda p: {"mask": p.mask.float()}, "bool"),
    "target": (lambda p: {"targets": p.targets * 0 - 100}, "-100 of row 0"),
    "temperature": (lambda p: {"temperature": -1.0}, "temperature"),
    "exact without reference": (lambda p: {"spec": PolicyLossSpec(kl_coef=0.1)}, "ref_hidden"),
    "k3 without reference": (
        lambda p: {"spec": PolicyLossSpec(kl_coef=0.1, kl_estimator="k3")}, "ref_logprobs",
    ),
    "sequence_mean": (
        lambda p: {"spec": PolicyLossSpec(aggregation="sequence_mean")}, "sequence_ids",
    ),
    "constant": (lambda p: {"spec": PolicyLossSpec(aggregation="constant")}, "num_items"),
    "num_items": (lambda p: {"num_items": 0}, "num_items"),
    "devices": (lambda p: {"advantages": p.advantages.to("meta")}, "on meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", POLICY_LOSS)
def test_linear_policy_loss(head_problem, case):
    p = head_problem().to(torch.float32)
    names = ("hidden", "weight", "targets", "old_logprobs", "advantages", "mask")
    change, says = POLICY_LOSS[case]
    given = {name: getattr(p, name) for name in names} | {"spec": PolicyLossSpec()} | change(p)
    with pytest.raises(ValueError, match=says):
        linear_policy_loss(**given)


@cpu_only
def test_a_second_backward_says_so(head_problem):
    p = head_problem().to(torch.float32)
    hidden = p.hidden.requires_grad_()
    out = linear_policy_loss(
        hidden, p.weight, p.targets, p.old_logprobs, p.advantages, p.mask, PolicyLossSpec(),
        backend="cpu",
    )  # fmt: skip
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already called"):
        out.loss.backward()
