"""A step with a broken loss or gradient is as if it had not been tried; three in a row are told."""

import json

import pytest
import torch
from test_resume import make

from fastrlhf import SelfCheckError


def broken_at(trainer, *numbers):
    """A gradient that is NaN at these optimizer steps, counted from 1."""
    original, calls = trainer.updater.step_at_the_end, []

    def step(losses, check):
        calls.append(1)
        parameter = trainer.backbone.trainable()[3]
        if len(calls) in numbers:
            handle = parameter.register_hook(lambda g: g * torch.nan)
            try:
                return original(losses, check)
            finally:
                handle.remove()
        return original(losses, check)

    trainer.updater.step_at_the_end = step
    return calls


def test_a_broken_step_changes_nothing_and_is_counted(tmp_path, capsys):
    trainer = make(tmp_path)
    broken_at(trainer, 2, 3, 5, 6, 7, 8)
    trainer.skipped.most = 5
    trainer.train()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [m["check/skipped_steps"] for m in metrics] == [2, 6, 6, 6]
    # Four optimizer steps a rollout: all of the second were skipped, and nothing was learnt from.
    assert "loss/policy" in metrics[0] and "loss/policy" not in metrics[1]
    assert trainer.schedule.last_epoch == 16 - 6
    assert metrics[2]["check/first_ratio"] == 1
    told = capsys.readouterr().err
    assert "was skipped: the gradient of" in told and "lora_" in told


def test_three_in_a_row_stop_the_run_with_a_diagnosis(tmp_path):
    trainer = make(tmp_path)
    calls = broken_at(trainer, 10, 11, 12)
    with pytest.raises(SelfCheckError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert len(calls) == 12
    assert "3 optimizer steps in a row" in message and "scores go from" in message
    assert "lora_" in message and "nan" in message
    assert "step-000002 (go on from it: train(resume_from_checkpoint=" in message


def test_broken_weights_are_never_saved(tmp_path):
    trainer = make(tmp_path)

    def spoil(*given):
        if trainer.callbacks.state.global_step == 4:
            with torch.no_grad():
                trainer.backbone.trainable()[0][0, 0] = torch.inf

    trainer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(SelfCheckError, match="step-000002"):
        trainer.train()
    there = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert there == {"step-000002"}
