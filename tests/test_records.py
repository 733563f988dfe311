"""Specs are refused when made; backends are resolved or raise; every public name is exported."""

import dataclasses
import math

import pytest
import torch

import fastrlhf_kernels
from fastrlhf_kernels import PolicyLossSpec, _backend, _cpu


def test_all_lists_every_public_name_once():
    assert sorted(fastrlhf_kernels.__all__) == fastrlhf_kernels.__all__
    for name in fastrlhf_kernels.__all__:
        assert getattr(fastrlhf_kernels, name).__doc__, name


def test_spec_defaults_are_the_contract():
    assert dataclasses.asdict(PolicyLossSpec()) == {
        "loss": "ppo_clip",
        "cliprange_low": 0.2,
        "cliprange_high": 0.2,
        "dual_clip": None,
        "kl_coef": 0.0,
        "kl_estimator": "exact",
        "old_kl_coef": 0.0,
        "entropy_coef": 0.0,
        "aggregation": "token_mean",
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolicyLossSpec().kl_coef = 1.0


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("loss", "ppo", "ppo_clip, ppo_kl, cispo, gspo, reinforce"),
        ("aggregation", "mean", "token_mean, sequence_mean, constant"),
        ("kl_estimator", "k4", "exact, k2, k3"),
        ("kl_estimator", "k1", "0 on average"),
        ("kl_coef", math.nan, "≥ 0"),
        ("kl_coef", -0.1, "≥ 0"),
        ("entropy_coef", math.inf, "≥ 0"),
        ("cliprange_low", -0.2, "≥ 0"),
        ("cliprange_high", math.nan, "≥ 0"),
        ("dual_clip", 1.0, "> 1"),
        ("dual_clip", math.nan, "> 1"),
        ("old_kl_coef", 0.1, "ppo_kl"),
    ],
)
def test_spec_refuses_and_names_the_field_and_what_is_allowed(field, value, says):
    with pytest.raises(ValueError, match=field) as raised:
        PolicyLossSpec(**{field: value})
    assert says in str(raised.value)


def test_dual_clip_belongs_to_ppo_clip():
    with pytest.raises(ValueError, match="dual_clip"):
        PolicyLossSpec(loss="reinforce", dual_clip=3.0)


def resolve(backend, dtype=torch.float32, **options):
    return _backend.resolve(backend, torch.device("cpu"), dtype, op="an_op", **options)


def test_an_explicit_backend_runs_or_raises(monkeypatch):
    assert resolve("reference") == "reference"
    with pytest.raises(ValueError, match="allowed are auto, triton, cpu, reference"):
        resolve("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton") == "triton"
    with pytest.raises(ValueError, match="float64"):
        resolve("triton", torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        resolve("triton")
    monkeypatch.setattr(_backend, "TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="pip install"):
        resolve("triton")
    with pytest.raises(RuntimeError, match="has no 'cpu' backend"):
        resolve("cpu", available=("reference",))
    with pytest.raises(ValueError, match="float64"):
        resolve("cpu", torch.float64)
    with pytest.raises(ValueError, match="top_k"):
        resolve("cpu", unsupported="top_k")


def test_auto_takes_the_reference_for_float64_and_for_what_cpu_lacks():
    assert resolve("auto", torch.float64) == "reference"
    assert resolve("auto", unsupported="top_k") == "reference"
    assert resolve("auto") == ("cpu" if _cpu.available() else "reference")


def test_a_missing_module_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_cpu, "_csrc", None)
    with pytest.raises(RuntimeError, match=r"C\+\+17 compiler"):
        resolve("cpu")
