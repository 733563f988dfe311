"""Transformers' callbacks are called at the events that they know, and obeyed."""

import json

import pytest
from test_trainer import FAST
from test_trainer import trainer as make
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from fastrlhf import UserError
from fastrlhf.callbacks import Callbacks


class Recorder(TrainerCallback):
    def __init__(self, stop_at=99, evaluate_at=99):
        self.events = []
        self.stop_at = stop_at
        self.evaluate_at = evaluate_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(("train_begin", state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step_end", state.global_step))
        control.should_training_stop = state.global_step >= self.stop_at
        control.should_evaluate = state.global_step == self.evaluate_at

    def on_log(self, args, state, control, logs, **kwargs):
        self.events.append(("log", logs["step"]))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(("evaluate", state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("train_end", state.global_step))


def test_callbacks_that_are_appended_later_see_transformers_own_state(tmp_path):
    live = make(tmp_path, total_episodes=32)
    assert not isinstance(live.callbacks.state, TrainerState)
    live.callbacks.state.best_metric = 0.25
    live.callbacks.callbacks.append(PrinterCallback())
    live.callbacks.step_begin(1)
    assert isinstance(live.callbacks.state, TrainerState)
    assert isinstance(live.callbacks.control, TrainerControl)
    state = live.callbacks.state
    assert (state.best_metric, state.global_step, state.max_steps) == (0.25, 1, 1)
    live.callbacks("on_log", logs={"step": 1})


def train_with(tmp_path, callback, **changes):
    trainer = make(tmp_path, total_episodes=96, **changes)
    trainer.callbacks.callbacks.append(callback)
    return trainer.train()


def test_events_come_in_order(tmp_path):
    callback = Recorder()
    train_with(tmp_path, callback)
    steps = [x for n in (1, 2, 3) for x in (("step_end", n), ("log", n))]
    assert callback.events == [
        ("train_begin", 0), ("evaluate", 0), *steps, ("evaluate", 3), ("train_end", 3),
    ]  # fmt: skip


def test_training_stops_where_a_callback_says(tmp_path):
    assert train_with(tmp_path, Recorder(stop_at=2)).steps == 2


def test_evaluation_where_a_callback_or_the_settings_say(tmp_path):
    train_with(tmp_path / "a", Recorder(evaluate_at=2))
    train_with(tmp_path / "b", Recorder(), eval_steps=2)
    for name in "ab":
        lines = (tmp_path / name / "run/evaluations.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 2, 3]


def test_a_class_is_made_an_object_and_a_control_that_is_returned_is_taken():
    class Returns(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return TrainerControl(should_training_stop=True)

    callbacks = Callbacks([Returns], FAST)
    callbacks("on_step_end")
    assert callbacks.control.should_training_stop


def test_what_is_no_callback_is_refused():
    with pytest.raises(UserError, match="derive it from"):
        Callbacks([print], FAST)


def test_along_the_run_an_evaluation_is_one_line(tmp_path, capsys):
    train_with(tmp_path, Recorder(), eval_steps=1, num_samples=2)
    told = capsys.readouterr().err
    assert told.count("Held-out prompts") == 4
    assert "Held-out prompts after step 1: score" in told and "after step 3" not in told
    samples = [line for line in told.splitlines() if " | " in line]
    assert len(samples) == 2 * 2
    # Every evaluation's samples are kept.
    kept = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept[::16]] == [0, 1, 2, 3]
