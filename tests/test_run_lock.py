"""A folder takes one run at a time, and the next one as soon as that has ended, however it did."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_resume import RUN, cut_off, kept, make
from transformers import TrainerCallback

from fastrlhf import UserError, run_lock
from fastrlhf.cli import main
from fastrlhf.run_lock import RunLock

HOLDS = """
import os, sys, time
from pathlib import Path
from fastrlhf.cli import main
from fastrlhf.run_lock import RunLock
lock = RunLock()
lock.hold(Path(sys.argv[1]))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.2)


def test_one_at_a_time(tmp_path):
    first, second = RunLock(), RunLock()
    first.hold(tmp_path)
    first.hold(tmp_path)
    with pytest.raises(UserError, match=f"a run is under way in {tmp_path}; wait for its end"):
        second.hold(tmp_path)
    second.release()
    assert (tmp_path / ".lock").exists(), "it is the first one's"
    first.release()
    assert not list(tmp_path.iterdir())
    with second:
        second.hold(tmp_path)
        (tmp_path / "other").mkdir()
        first.hold(tmp_path / "other")
    first.hold(tmp_path)
    assert not list((tmp_path / "other").iterdir()), "a lock is held in one folder"


def test_it_waits_for_one_that_is_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 30)
    first, second = RunLock(), RunLock()
    first.hold(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: first.release())
    second.hold(tmp_path)
    assert (tmp_path / ".lock").exists()


def test_one_that_nobody_refers_to_is_free(tmp_path):
    RunLock().hold(tmp_path)
    RunLock().hold(tmp_path)


@pytest.mark.parametrize("error", [OSError(95, "no locks here"), PermissionError(13, "denied")])
def test_a_file_system_without_locks(tmp_path, monkeypatch, error):
    def refuses(*_):
        raise error

    monkeypatch.setattr(run_lock.fcntl, "flock", refuses)
    with RunLock() as first, RunLock() as second:
        first.hold(tmp_path)
        second.hold(tmp_path)
    monkeypatch.setattr(run_lock, "fcntl", None)
    RunLock().hold(tmp_path)
    RunLock().hold(tmp_path / "missing")


def test_kill_minus_nine_frees_it_though_a_worker_lives_on(tmp_path):
    words = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        worker = int(run.stdout.readline())
        try:
            with pytest.raises(UserError, match="under way"):
                RunLock().hold(tmp_path)
            run.kill()
            run.wait()
            os.kill(worker, 0)  # it is there
            RunLock().hold(tmp_path)
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_run_that_is_under_way_is_left_alone(tmp_path):
    """Neither gone on with nor begun anew; the other folder is free."""
    seen = []

    class Meddle(TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            if state.global_step == 0:
                with pytest.raises(UserError, match="a run is under way in"):
                    make(tmp_path).train()
                seen.append("begin")

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                with pytest.raises(UserError, match="a run is under way in"):
                    make(tmp_path).train(resume_from_checkpoint=True)
                make(tmp_path, output_dir=str(tmp_path / "other")).train()
                seen.append("resume")

    trainer = make(tmp_path, RUN, Meddle())
    trainer.train()
    assert seen == ["begin", "resume"] and not list(tmp_path.rglob(".lock"))
    assert kept(tmp_path / "run") == kept(tmp_path / "other")
    # The same trainer once more: its run has ended, and is no longer held.
    with pytest.raises(UserError, match="already holds a run"):
        trainer.train()
    assert trainer.train(resume_from_checkpoint=True).steps == 4


def test_the_command_line_tells_it_before_it_loads(tmp_path, capsys):
    config = make(tmp_path).config
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml())
    with RunLock() as lock:
        lock.hold(tmp_path / "run")
        assert main(["ppo", "--resume", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "a run is under way in" in told and "loading" not in told


def test_a_run_that_could_not_begin_leaves_its_folder_free(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.keeper.checkpoints, "check_room", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    cut_off(tmp_path)
    assert make(tmp_path).train(resume_from_checkpoint=True).steps == 4
