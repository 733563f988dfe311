"""Transformers' callbacks are called at the events that they know, and obeyed."""

import dataclasses
import json

import pytest
from test_trainer import FAST
from test_trainer import trainer as make
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from fastrlhf import UserError
from fastrlhf.callbacks import Callbacks
from fastrlhf.trackers import Tracker


class Recorder(TrainerCallback):
    def __init__(self, stop_at=99, evaluate_at=99):
        self.events = []
        self.stop_at = stop_at
        self.evaluate_at = evaluate_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(("train_begin", state.global_step))

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append(("step_begin", state.global_step))

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


def evaluated(tmp_path):
    lines = (tmp_path / "run/evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_events_come_in_order(tmp_path):
    callback = Recorder()
    train_with(tmp_path, callback)
    # As transformers counts: a step is told of when it is done.
    steps = [x for n in (1, 2, 3) for x in (("step_begin", n - 1), ("step_end", n), ("log", n))]
    assert callback.events == [
        ("train_begin", 0), ("evaluate", 0), *steps, ("evaluate", 3), ("train_end", 3),
    ]  # fmt: skip


def test_training_stops_where_a_callback_says(tmp_path):
    assert train_with(tmp_path, Recorder(stop_at=2)).steps == 2


def test_evaluation_where_a_callback_or_the_settings_say(tmp_path):
    train_with(tmp_path / "a", Recorder(evaluate_at=2))
    train_with(tmp_path / "b", Recorder(), eval_steps=2)
    for name in "ab":
        assert evaluated(tmp_path / name) == [0, 2, 3]


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


class Sated(TrainerCallback):
    """Ends the run in its evaluation after a step, by a control of its own."""

    def __init__(self, after=1):
        self.after = after

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            return TrainerControl(should_training_stop=True)


def test_what_is_asked_for_in_an_evaluation_is_done_at_once(tmp_path):
    assert train_with(tmp_path, Sated(), eval_steps=1).steps == 1


class Evaluations(TrainerCallback):
    """Notes after which steps there was one."""

    def __init__(self):
        self.steps = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.mark.parametrize(
    ("callback", "changes", "steps"),
    [
        (Recorder(stop_at=2), {"eval_steps": 1}, [0, 1, 2]),
        (Sated(after=2), {"eval_steps": 1}, [0, 1, 2]),
        (Recorder(), {"eval_steps": 1, "kl_limit": 1e-9}, [0, 1, 2]),
        (Recorder(evaluate_at=3), {"eval_steps": 2}, [0, 2, 3]),
    ],
    ids=["callback", "evaluation", "limit", "last step"],
)
def test_the_step_that_ends_a_run_is_evaluated_once(tmp_path, callback, changes, steps):
    seen = Evaluations()
    trainer = make(tmp_path, total_episodes=96, **changes)
    trainer.callbacks.callbacks += [callback, seen]
    summary = trainer.train()
    assert seen.steps == evaluated(tmp_path) == steps and summary.steps == steps[-1]
    figures = json.loads((tmp_path / "run/evaluations.jsonl").read_text().splitlines()[-1])
    assert summary.score_after == figures["score"] and summary.kl == figures["kl"]


def test_transformers_early_stopping_ends_a_run_that_gains_nothing(tmp_path):
    def nothing_to_gain(completions, **_):
        return [0.5] * len(completions)

    patience = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make(tmp_path, nothing_to_gain, total_episodes=32 * 6, eval_steps=1, save_best=True)
    trainer.callbacks.callbacks.append(patience)
    # The first evaluation is what the next two are not better than.
    assert trainer.train().steps == 3 and evaluated(tmp_path) == [0, 1, 2, 3]
    state = trainer.callbacks.state
    assert (state.best_metric, state.best_global_step) == (0.5, 1)
    assert state.best_model_checkpoint == str(tmp_path / "run/checkpoints/best")


def test_early_stopping_goes_on_while_there_is_a_gain(tmp_path):
    calls = []

    def better_and_better(completions, **_):
        calls.append(1)
        return [float(len(calls))] * len(completions)

    trainer = make(tmp_path, better_and_better, total_episodes=32 * 4, eval_steps=1)
    trainer.callbacks.callbacks.append(EarlyStoppingCallback(early_stopping_patience=1))
    assert trainer.train().steps == 4


def test_early_stopping_without_evaluations_is_refused():
    with pytest.raises(UserError, match="set eval_steps"):
        Callbacks([EarlyStoppingCallback], FAST)


def test_a_tracker_sees_an_evaluation_under_our_names_alone(tmp_path):
    class Seen(Tracker):
        def write(self, figures, step):
            self.figures = figures

    class Sees(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.metrics = metrics

    tracker, callback = Seen(tmp_path, "run"), Sees()
    Callbacks([tracker, callback], FAST)("on_evaluate", metrics={"score": 1.0})
    assert tracker.figures == {"eval/score": 1.0}
    assert callback.metrics == {"score": 1.0, "eval_score": 1.0}


class Counting(TrainerCallback):
    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_a_callback_finds_its_state_whatever_stands_beside_it():
    patience = EarlyStoppingCallback()
    patience.early_stopping_patience_counter = 7
    evaluating = dataclasses.replace(FAST, eval_steps=1)
    held = Callbacks([Counting(1), patience, Counting(2)], evaluating).state_dict()
    held = json.loads(json.dumps(held))
    # An older checkpoint counted all callbacks.
    names = ("Counting-1", "EarlyStoppingCallback-2", "Counting-3")
    old = dict(zip(names, held["callbacks"].values(), strict=True))
    for kept in (held, held | {"callbacks": old}):
        again = [PrinterCallback(), EarlyStoppingCallback(), Counting(), Counting(), Counting(9)]
        Callbacks(again, evaluating).load_state_dict(kept)
        assert [one.count for one in again[2:]] == [1, 2, 9]
        assert again[1].early_stopping_patience_counter == 7
