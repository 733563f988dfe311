"""Checkpoints that do not fit are told before the first step; a full disk later loses nothing."""

import errno
import json
import shutil

import pytest
from peft import PeftModel
from test_resume import kept, make
from transformers import AutoModelForCausalLM, TrainerCallback

import fastrlhf.run_state as module
from fastrlhf import MultiAgentConfig, PPOConfig, UserError
from fastrlhf.run_checkpoints import checkpoint_bytes, resume_command, tidy


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())


def test_the_newest_are_kept_and_load_with_peft(tmp_path):
    make(tmp_path, save_steps=1, eval_steps=1, save_best=True).train()
    assert names(tmp_path) == ["best", "final", "step-000003", "step-000004"]
    folder = tmp_path / "run/checkpoints/step-000003"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), str(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {*manifest["sha256"], "manifest.json"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pth"))]


def test_a_callback_may_ask_for_one(tmp_path):
    class Asks(TrainerCallback):
        saved = ()

        def on_step_end(self, args, state, control, **_):
            control.should_save = state.global_step == 3

        def on_save(self, args, state, control, **_):
            self.saved = (*self.saved, state.global_step)

    asks = Asks()
    trainer = make(tmp_path, save_steps=None)
    trainer.callbacks.callbacks.append(asks)
    trainer.train()
    assert asks.saved == (3,) and names(tmp_path) == ["final", "step-000003"]


def test_the_size_that_is_asked_for_is_that_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrlhf.run_checkpoints.TEXTS", 0)
    for i, changes in enumerate(({"lora_rank": 64}, {"use_peft": False, "train_layers": "all"})):
        path = tmp_path / str(i)
        path.mkdir()
        trainer = make(path, save_steps=2, save_total_limit=1, **changes)
        planned = checkpoint_bytes(trainer.run, trainer.config)
        trainer.train()
        run = path / "run/checkpoints"
        sizes = {
            f.name: sum(x.stat().st_size for x in f.rglob("*.safetensors")) for f in run.iterdir()
        }
        real = 2 * sizes["step-000004"] + sizes["final"]
        # Names and shapes stand in the files' heads; the tiny model's are as long as its numbers.
        assert planned <= real <= planned + 3 * 64 * 1024


def test_a_small_disk_is_told_before_the_first_step(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="MiB free; lower save_total_limit, set save_steps to null"):
        trainer.train()
    assert not (tmp_path / "run/metrics.jsonl").read_text()


def full(monkeypatch, when):
    original = module.save_file

    def save_file(tensors, path):
        original(tensors, path)
        if when(str(path)):
            raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("run_state", "checkpoint"):
        monkeypatch.setattr(f"fastrlhf.{name}.save_file", save_file)


def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch, capsys):
    make(tmp_path, output_dir=str(tmp_path / "free")).train()
    with monkeypatch.context() as patch:
        full(patch, lambda path: "step-000004" in path)
        make(tmp_path).train()
    told = capsys.readouterr().err
    assert "step-000004 could not be written (No space left on device) and the run goes on" in told
    assert names(tmp_path) == ["final", "step-000002"]
    assert kept(tmp_path / "run") == kept(tmp_path / "free")


def test_final_weights_that_do_not_fit_can_be_had_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full(patch, lambda path: "/.final-" in path)
        with pytest.raises(UserError, match=r"make room .*step-000004 \(go on from it"):
            make(tmp_path).train()
    make(tmp_path).train(resume_from_checkpoint=True)
    assert "final" in names(tmp_path)


def test_what_a_kill_left_half_done_is_cleared_away(tmp_path):
    (tmp_path / ".step-000004-ab" / "step-000004").mkdir(parents=True)
    (tmp_path / ".best-old-cd" / "best").mkdir(parents=True)
    (tmp_path / ".final-old-ef" / "final").mkdir(parents=True)
    (tmp_path / "final").mkdir()
    tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "final"]


def test_who_has_no_verb_goes_on_from_python(tmp_path):
    assert resume_command(PPOConfig(), tmp_path, {}) == f"fastrlhf ppo --resume {tmp_path}"
    words = f"train(resume_from_checkpoint={str(tmp_path)!r})"
    assert resume_command(MultiAgentConfig(), tmp_path, {}) == words
    assert resume_command(PPOConfig(), tmp_path, {"model": None, "reward": True}) == words
