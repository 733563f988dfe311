"""A signal during the last evaluation leaves a checkpoint of the moment before it."""

import os
import signal
from dataclasses import replace

import pytest
from test_resume import RUN, Counting, kept, make

import fastrlhf.trainer as module
from fastrlhf import UserError


def run(tmp_path, name, **changes):
    """A run whose reward counts how often it is asked, in evaluations too."""
    trainer = make(tmp_path, RUN, output_dir=str(tmp_path / name), **changes)
    counting = replace(trainer.reward.objectives[0], function=Counting())
    trainer.reward.objectives[0] = counting
    return trainer


def signal_in_the_last_evaluation(monkeypatch, trainer, number):
    original, state = module.evaluate, trainer.callbacks.state

    def evaluate(*given):
        found = original(*given)
        if state.global_step == trainer.config.steps:
            os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(module, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("number", "status", "save_steps"),
    [(signal.SIGTERM, 143, 3), (signal.SIGINT, None, 3), (signal.SIGTERM, 143, 2)],
)
def test_it_leaves_as_elsewhere_and_a_resume_only_finishes(
    tmp_path, monkeypatch, capsys, number, status, save_steps
):
    run(tmp_path, "free", save_steps=save_steps).train()
    stopped = run(tmp_path, "run", save_steps=save_steps)
    with monkeypatch.context() as patch:
        signal_in_the_last_evaluation(patch, stopped, number)
        with pytest.raises(SystemExit if status else KeyboardInterrupt) as left:
            stopped.train()
    if status:
        assert left.value.code == status
    told = capsys.readouterr().err
    assert "stopped after step 4; go on with: train(resume_from_checkpoint=" in told
    there = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert "step-000004" in there and not there & {"final", "interrupted"}
    again = run(tmp_path, "run", save_steps=save_steps)
    monkeypatch.setattr(again, "step", None)
    assert again.train(resume_from_checkpoint=True).steps == 4
    assert kept(tmp_path / "run") == kept(tmp_path / "free")


def test_what_json_cannot_hold_ends_no_run_that_keeps_nothing(tmp_path):
    class Odd(Counting):
        def state_dict(self):
            return {"calls": object()}

    trainer = run(tmp_path, "run", save_steps=None)
    trainer.reward.objectives[0] = replace(trainer.reward.objectives[0], function=Odd())
    assert trainer.train().steps == 4
    with pytest.raises(UserError, match="cannot be saved as JSON"):
        trainer.run.moment()
