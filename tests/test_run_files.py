"""Folders of runs are read while they are written; others are refused in a sentence."""

import pytest
from run_folders import make_run

from fastrlhf.cli import main
from fastrlhf.errors import UserError
from fastrlhf.reward_config import RewardConfig
from fastrlhf.run_files import is_run, read_json_lines, read_run


def test_a_run_is_read(tmp_path):
    run = read_run(make_run(tmp_path / "mine", steps=3))
    assert run.name == "mine" and len(run.metrics) == 3 and is_run(tmp_path / "mine")
    assert [run.episode(line["step"]) for line in run.evaluations] == [0, 12]
    assert run.settings["batch_size"] == 4 and run.summary is None and run.findings == []


def test_a_last_line_that_is_half_written_is_left_out(tmp_path):
    folder = make_run(tmp_path / "mine", steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "obj')
    assert len(read_run(folder).metrics) == 3


def test_any_other_broken_line_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: not JSON"):
        read_json_lines(tmp_path / "m.jsonl")


def test_folders_without_a_run(tmp_path):
    with pytest.raises(UserError, match=r"no run .*none: give a run's folder"):
        read_run(tmp_path / "none")
    make_run(tmp_path / "runs/ppo", steps=1)
    with pytest.raises(UserError, match=r"holds no metrics.jsonl.*it holds runs: ppo"):
        read_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").touch()
    with pytest.raises(UserError, match="has finished no rollout yet"):
        read_run(tmp_path / "empty")


def test_the_run_of_a_reward_model_is_told_from_others(tmp_path, capsys):
    folder = tmp_path / "reward"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss/reward": 0.5}\n')
    (folder / "config.yaml").write_text(RewardConfig().to_yaml())
    with pytest.raises(UserError, match=r"trained a reward model, not a policy"):
        read_run(folder)
    for verb in ("report", "eval", "plot"):
        assert main([verb, str(folder)]) == 2
        assert "trained a reward model" in capsys.readouterr().err
    for words in (["export", str(folder), "--output", "x"], ["ppo", "--resume", str(folder)]):
        assert main(words) == 2
        assert "trained a reward model" in capsys.readouterr().err
