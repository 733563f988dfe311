"""What ends a run is decided once: killed in its last evaluation, it ends there when resumed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_resume import RUN, kept, make
from transformers import TrainerCallback

from fastrlhf.rewards.monitor import Finding
from fastrlhf.run_end import RunEnd

LONG = replace(RUN, total_episodes=16 * 8)


class Ask(TrainerCallback):
    """Ends a run after its third rollout, and only when first asked."""

    def __init__(self):
        self.asked = False

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3 and not self.asked:
            self.asked = control.should_training_stop = True


class Kill(TrainerCallback):
    """Breaks the run off in its last evaluation."""

    def on_evaluate(self, args, state, control, **_):
        if state.global_step:
            raise ZeroDivisionError


def see_hacking(trainer):
    """The monitor finds something in the third rollout."""
    observe = trainer.monitor.observe

    def found(rollout, scores, line, controller=None):
        if line["step"] == 3:
            trainer.monitor.found.append(Finding(3, "repetition", "", ""))
        return observe(rollout, scores, line, controller)

    trainer.monitor.observe = found


def ended(tmp_path, kind, name, *callbacks, **changes):
    """A run that its limit, a callback or the monitor ends."""
    given = {"limit": {"kl_limit": 1e-9}, "monitor": {"hacking": "stop"}}.get(kind, {})
    callbacks = (Ask(), *callbacks) if kind == "callback" else callbacks
    path = str(tmp_path / name)
    trainer = make(tmp_path, LONG, *callbacks, output_dir=path, **given | changes)
    if kind == "monitor":
        see_hacking(trainer)
    return trainer


@pytest.mark.parametrize(
    ("kind", "save_steps"), [("limit", 1), ("monitor", 1), ("callback", 1), ("callback", 5)]
)
def test_a_run_that_has_ended_stays_so(tmp_path, capsys, kind, save_steps):
    steps = ended(tmp_path, kind, "free", save_steps=save_steps).train().steps
    assert steps == (2 if kind == "limit" else 3)
    killed = ended(tmp_path, kind, "run", Kill(), save_steps=save_steps)
    with pytest.raises(ZeroDivisionError):
        killed.train()
    again = ended(tmp_path, kind, "run", save_steps=save_steps)
    if kind == "callback":
        # Whoever asked is not there any more.
        again.callbacks.callbacks.clear()
    summary = again.train(resume_from_checkpoint=True)
    assert summary.steps == steps
    assert "only its last evaluation is left" in capsys.readouterr().err
    assert kept(tmp_path / "run") == kept(tmp_path / "free")
    told = [json.loads((Path(tmp_path) / x / "summary.json").read_text()) for x in ("run", "free")]
    assert told[0]["score_after"] == told[1]["score_after"]


def test_without_checkpoints_none_is_written(tmp_path):
    ended(tmp_path, "limit", "run", save_steps=None).train()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["final"]


def test_why_it_ends():
    told = []
    end = RunEnd(replace(RUN, kl_limit=1.0), told.append)
    assert not end.decide({"objective/kl": 1.0}, callback=False, monitor=False)
    assert end.reason is None and not told
    assert end.decide({"objective/kl": 1.1}, callback=True, monitor=True)
    assert told == ["stopped: the KL exceeds kl_limit (1.0)"]
    free = RunEnd(RUN, told.append)
    assert free.decide({}, callback=False, monitor=True) and "hacking" in free.reason
    assert free.decide({}, callback=True, monitor=False) and "callback" in free.reason
    again = RunEnd(RUN, told.append)
    again.load_state_dict(json.loads(json.dumps(free.state_dict())))
    assert again.reason == free.reason
