"""A step leaves nothing behind: neither tensors nor memory, however long the run."""

import ctypes
import gc
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from test_trainer import trainer

from fastrlhf.backbone import SharedBackbone


def resident_mb() -> float:
    """VmRSS, without what malloc keeps for itself."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise KeyError("VmRSS")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def watch_steps(t, monkeypatch, at):
    """(live tensors, resident MiB) after the steps ``at``."""
    seen = {}
    original = t.folder.write_metrics

    def write_metrics(line):
        original(line)
        if line["step"] in at:
            seen[line["step"]] = live_tensors(), resident_mb()

    monkeypatch.setattr(t.folder, "write_metrics", write_metrics)
    return seen


def small_run(tmp_path, **changes):
    """Steps whose rollouts are 0.3 MB of states, which 40 leaked ones would show."""
    backbone = SharedBackbone(
        tiny.model(hidden_size=512, intermediate_size=64, num_hidden_layers=2), train_layers=1
    )
    settings = dict(
        batch_size=8, num_mini_batches=1, num_ppo_epochs=1, total_episodes=8 * 50, eval_prompts=2,
        response_length=16, microbatch_tokens=200, learning_rate=1e-4,
    )  # fmt: skip
    return trainer(tmp_path, backbone=backbone, **settings | changes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_fifty_steps(tmp_path, monkeypatch):
    t = small_run(tmp_path)
    seen = watch_steps(t, monkeypatch, at=(10, 50))
    t.train()
    (tensors, before), (tensors_later, after) = seen[10], seen[50]
    assert tensors_later == tensors
    assert after - before < 5, f"{after - before:.1f} MiB in 40 steps"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_leak_would_be_seen(tmp_path, monkeypatch):
    t = small_run(tmp_path, total_episodes=8 * 12)
    seen = watch_steps(t, monkeypatch, at=(4, 12))
    kept, original = [], t.engine.generate
    monkeypatch.setattr(t.engine, "generate", lambda *x: kept.append(original(*x)) or kept[-1])
    t.train()
    assert seen[12][0] > seen[4][0]


@pytest.mark.parametrize("cached", [True, False])
def test_the_trunk_is_dropped_before_the_next_generation(tmp_path, monkeypatch, cached):
    t = trainer(tmp_path, trunk_cache=cached, total_episodes=96)
    original, states = t.engine.generate, []

    def generate(*given):
        assert not any(x() is not None for x in states), "the last rollout's states are still here"
        rollout = original(*given)
        assert (rollout.trunk is not None) == cached
        kept = rollout.trunk.device_rows if cached else rollout.attention_mask
        states.append(weakref.ref(kept))
        return rollout

    monkeypatch.setattr(t.engine, "generate", generate)
    t.train()
    assert len(states) == 5, "three steps and two evaluations"
