"""A run's figures reach the trackers that it names, and no others are touched."""

import importlib.machinery
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import signals
import tiny
from test_resume import make as resumable
from test_trainer import FAST
from test_trainer import trainer as make

import fastrlhf.trackers as module
from fastrlhf import MultiAgentTrainer, PPOConfig, UserError
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
        self.id = given.get("id") or "fresh"
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


@pytest.mark.parametrize("kind", ["one", "agents"])
def test_a_run_that_goes_on_is_the_same_one_in_the_same_folder(tmp_path, monkeypatch, kind):
    """Resumed from Python, with no folder in its settings."""
    service = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.chdir(tmp_path)

    def made(**changes):
        changes |= {"report_to": ["wandb"], "output_dir": None}
        if kind == "one":
            return resumable(tmp_path, save_steps=1, **changes)
        tiny.folder(tmp_path / "model")
        config = replace(signals.FAST, model="model", save_steps=1, total_episodes=32, **changes)
        return MultiAgentTrainer(None, signals.Signals(), config)

    made().train()
    first = service.given
    run = str(Path(first["dir"]))
    assert first["id"] is None and Path(run, "wandb_id").read_text() == "fresh"
    Path(run, "wandb_id").write_text("kept")
    made().train(resume_from_checkpoint=run)
    assert service.given["dir"] == run and len(list(Path("runs").iterdir())) == 1
    assert service.given["id"] == "kept" and service.given["resume"] == "allow"
    assert Path(run, "wandb_id").read_text() == "kept"
    # Another run is another one.
    made().train()
    assert service.given["dir"] != run and service.given["id"] is None


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
