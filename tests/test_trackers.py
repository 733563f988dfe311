"""A run's figures reach the trackers that it names, and no others are touched."""

import importlib.machinery
import sys
from types import SimpleNamespace

import pytest
from test_trainer import FAST
from test_trainer import trainer as make

import fastrlhf.trackers as module
from fastrlhf import PPOConfig, UserError
from fastrlhf.config import load_config


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make(tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [e.step for e in events.Scalars("objective/scores")] == [1, 2]
    assert [e.step for e in events.Scalars("eval/score")] == [0, 2]
    (settings,) = events.Tensors("settings/text_summary")
    assert b"learning_rate: 0.01" in settings.tensor_proto.string_val[0]


class Service(SimpleNamespace):
    """A module like wandb's and trackio's: `init` gives a run."""

    def __init__(self, name):
        super().__init__(lines=[], finished=0, init=self.begin, __name__=name)
        # find_spec asks a module that is imported already for its own.
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def begin(self, **given):
        self.given = given
        return self

    def log(self, figures, step):
        self.lines.append((step, figures))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_settings_metrics_and_evaluations(tmp_path, monkeypatch, name):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    make(tmp_path, report_to=[name], kl_coef=0.5).train()
    assert service.given["project"] == "fastrlhf" and service.given["config"]["kl_coef"] == 0.5
    kinds = [(step, "eval/score" in figures) for step, figures in service.lines]
    assert kinds == [(0, True), (1, False), (2, False), (2, True)]
    assert service.lines[1][1]["objective/kl"] == 0 and "step" not in service.lines[1][1]
    assert service.finished == 1


def test_what_was_not_measured_is_left_out():
    assert module.numbers({"a": 1.0, "b": None, "c": float("nan"), "step": 3, "d": "x"}) == {
        "a": 1.0
    }


def test_a_package_that_is_missing_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrlhf.callbacks.find_spec", lambda name: None)
    config = PPOConfig(model="nowhere/at-all", report_to="wandb", output_dir=str(tmp_path / "run"))
    from fastrlhf import PPOTrainer

    with pytest.raises(UserError, match="wandb is not installed; run: pip install wandb"):
        PPOTrainer(args=config)
    assert not list(tmp_path.iterdir())


def test_names():
    assert FAST.trackers == []
    both = load_config(None, [("report_to", "[wandb, tensorboard, wandb]")])
    assert both.trackers == ["wandb", "tensorboard"]
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        PPOConfig(report_to="wandbb")
    with pytest.raises(UserError, match="'3' is no tracker"):
        PPOConfig(report_to=[3])
    assert set(module.TRACKERS) == {"wandb", "tensorboard", "trackio"}


def test_nothing_is_imported_unless_asked_for(tmp_path, monkeypatch):
    for name in module.TRACKERS:
        # An import of what is None fails.
        monkeypatch.setitem(sys.modules, name, None)
    make(tmp_path).train()
