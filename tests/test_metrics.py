"""A run's folder belongs to one run, and its figures mean what their names say."""

import json
import subprocess
import sys
import time

import pytest

from fastrlhf.errors import UserError
from fastrlhf.metrics import PhaseTimer, RunFolder
from fastrlhf.phase_memory import PhaseMemory


def test_free_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/demo", "runs/demo-2", "runs/demo-3"):
        folder = RunFolder(None, "demo")
        assert not folder.path.exists(), "nothing is made before make()"
        folder.make()
        assert str(folder.path) == expected


def test_two_runs_never_share_a_numbered_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = RunFolder(None, "demo"), RunFolder(None, "demo")
    first.make()
    with pytest.raises(UserError, match="cannot be written"):
        second.make()


def test_a_folder_without_a_step_may_be_used_again(tmp_path):
    RunFolder(str(tmp_path / "run"), "demo").make()
    folder = RunFolder(str(tmp_path / "run"), "demo")
    folder.make()
    folder.lock.release()
    folder.write_metrics({"step": 1})
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder(str(tmp_path / "run"), "demo").make()


def test_what_a_run_left_in_its_first_rollout_is_no_other_runs(tmp_path):
    """Its metrics are empty, so that the folder is free; its evaluation before training is not."""
    (tmp_path / "run").mkdir()
    for name in ("evaluations.jsonl", "findings.jsonl", "samples.jsonl", "adaptations.jsonl"):
        (tmp_path / "run" / name).write_text('{"step": 0, "score": -123.0}\n')
    (tmp_path / "run/notes.jsonl").write_text("{}\n")
    # The user's own, under the names of a run's files: no run was here.
    mine = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    folder = RunFolder(str(tmp_path / "run"), "demo")
    folder.make()
    folder.lock.release()
    assert mine == {p.name: p.read_text() for p in folder.path.iterdir() if p.name in mine}
    again = RunFolder(str(tmp_path / "run"), "demo")
    again.make()
    again.lock.release()
    left = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    assert left == {"metrics.jsonl": "", "notes.jsonl": "{}\n"}


def test_a_full_disk_is_a_sentence(tmp_path):
    folder = RunFolder(str(tmp_path / "run"), "demo")
    folder.make()
    full = tmp_path / "run/findings.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"findings.jsonl cannot be written \(No space left.*room"):
        folder.append("findings.jsonl", {"sign": "length"})
    (tmp_path / "run/.given.json.new").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"given.json cannot be written"):
        folder.write_text("given.json", "{}")


def test_a_path_through_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another output_dir"):
        RunFolder(str(tmp_path / "file" / "run"), "demo")


def test_metrics_are_whole_lines(tmp_path):
    folder = RunFolder(str(tmp_path / "run"), "demo")
    folder.make()
    for step in (1, 2):
        folder.write_metrics({"step": step, "text": "π"})
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert folder.read_metrics()[1]["text"] == "π"


def test_a_line_makes_the_folder_of_a_run_that_was_not_begun(tmp_path):
    # `for number, prompts in enumerate(trainer.batches()): trainer.step(number, prompts)`
    RunFolder(tmp_path / "runs/mine", "mine").append("findings.jsonl", {"sign": "length"})
    assert json.loads((tmp_path / "runs/mine/findings.jsonl").read_text()) == {"sign": "length"}


def test_phases_add_up():
    seen = []
    timer = PhaseTimer(seen.append)
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.02)
    taken = timer.take_step()
    assert seen == ["rollout", "rollout"]
    assert 0.04 <= taken["time/rollout"] < 1
    assert timer.take_step() == {}
    assert timer.total["rollout"] == taken["time/rollout"]


def test_peak_memory_is_that_of_its_process_and_in_megabytes():
    """In a process of its own, whose peak no earlier test has raised."""
    script = (
        "from fastrlhf.phase_memory import PhaseMemory\n"
        "memory = PhaseMemory()\n"
        "before = memory.peak_mb()\n"
        "with memory('one'):\n"
        "    block = b'x' * (200 * 2**20)\n"
        "del block\n"
        "with memory('two'):\n"
        "    pass\n"
        "assert memory.peaks['one'] > memory.peaks['two'] + 150 * 2**20, memory.peaks\n"
        "print(memory.peak_mb() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 150 < float(done.stdout) < 250, done.stderr


def test_no_library_is_asked_for_malloc_where_there_is_no_glibc(monkeypatch):
    def refuses(name):
        raise TypeError("CDLL takes a name here")

    monkeypatch.setattr("ctypes.CDLL", refuses)
    monkeypatch.setattr("sys.platform", "win32")
    PhaseMemory().restart()
