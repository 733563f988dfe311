"""The code of docs/integrations.md runs as it stands there."""

import importlib
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from datasets import Dataset
from trl import GRPOConfig
from trl.trainer import utils

from fastrlhf.integrations import trl, verl

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"


def block(heading: str) -> str:
    """The Python of a section."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return section.split("```python\n")[1].split("```")[0]


def test_pytorch():
    model = tiny.model().train()
    before = model.lm_head.weight.detach().clone()
    namespace = dict(
        model=model,
        tokens=torch.randint(1, 27, (2, 9)),
        advantages=torch.randn(2, 8),
        mask=torch.ones(2, 8, dtype=torch.bool),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    exec(block("PyTorch"), namespace)
    assert namespace["old_logprobs"].shape == (2, 8)
    # The second epoch's ratio has moved from 1.
    assert abs(float(namespace["stats"].ratio) - 1) > 1e-4
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")
def test_trl(tmp_path, monkeypatch):
    calls = []
    apply = trl.ChunkedLogProbs.apply
    monkeypatch.setattr(
        trl.ChunkedLogProbs, "apply", lambda *given: calls.append(1) or apply(*given)
    )
    namespace = dict(
        model=str(tiny.folder(tmp_path / "model")),
        tokenizer=tiny.tokenizer(),
        reward=lambda completions, **_: [float(text.count("a")) for text in completions],
        dataset=Dataset.from_list([{"prompt": "the cat"}] * 2),
        args=GRPOConfig(
            str(tmp_path / "out"), per_device_train_batch_size=2, num_generations=2, max_steps=1,
            max_completion_length=4, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        ),
    )  # fmt: skip
    original = utils._ChunkedLogProbFunction
    try:
        exec(block("TRL"), namespace)
        assert utils._ChunkedLogProbFunction is trl.ChunkedLogProbs
    finally:
        trl.unpatch()
    assert calls and utils._ChunkedLogProbFunction is original


def test_verl(monkeypatch):
    done = []
    monkeypatch.setattr(verl, "patch", lambda: done.append("patch"))
    monkeypatch.setattr(verl, "register", lambda: done.append("register"))
    exec(block("verl"), {})
    assert done == ["patch", "register"]


def test_openrlhf(monkeypatch):
    given: dict = {}
    ray = ModuleType("ray")
    ray.init = lambda runtime_env: given.update(runtime_env)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: given.update(ran=name))
    exec(block("OpenRLHF"), {})
    assert given["ran"] == "openrlhf.cli.train_ppo_ray"
    module, _, name = given["worker_process_setup_hook"].rpartition(".")
    hook = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(metadata, "version", lambda name: "0.1")
    with pytest.raises(ImportError, match=r"found openrlhf 0\.1"):
        hook()
