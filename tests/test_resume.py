"""A run that was cut off anywhere goes on to the same bits as one that was not."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from transformers import TrainerCallback

from fastrlhf import GRPOConfig, PPOConfig, UserError
from fastrlhf.configs import CONFIGS
from fastrlhf.rewards.monitor import HackingMonitor
from fastrlhf.trainers import TRAINERS

PROMPTS = [{"prompt": a + b} for a in "abcdefgh" for b in "ijklmnop"]
RUN = PPOConfig(
    total_episodes=64, batch_size=16, num_mini_batches=2, num_ppo_epochs=2, response_length=6,
    learning_rate=1e-2, train_layers=2, lora_rank=8, kl_coef=0.02, microbatch_tokens=80,
    eval_prompts=8, num_samples=0, save_steps=2,
)  # fmt: skip
GROUPS = GRPOConfig(
    algorithm="dapo", total_episodes=64, batch_size=16, num_generations=4, response_length=6,
    learning_rate=1e-2, train_layers=2, lora_rank=8, kl_coef=0.02, kl_controller="adaptive",
    kl_target=0.5, kl_horizon=100.0, microbatch_tokens=80, eval_prompts=8, num_samples=0,
    save_steps=2,
)  # fmt: skip


def letters(completions, **_):
    return [float("e" in text) + text.count("a") / 8 for text in completions]


class Stop(TrainerCallback):
    """Breaks a run off, like an error would, after a step."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.after:
            raise ZeroDivisionError


def make(tmp_path, run=RUN, *callbacks, **changes):
    if not (tmp_path / "model").exists():
        tiny.folder(tmp_path / "model")
    config = replace(
        run, model=str(tmp_path / "model"), **{"output_dir": str(tmp_path / "run"), **changes}
    )
    verb = next(verb for verb, kind in CONFIGS.items() if kind is type(config))
    return TRAINERS[verb](None, letters, config, PROMPTS, callbacks=callbacks)


def kept(run: Path):
    """What must be the same: weights and lines, times aside."""
    final = run / "checkpoints/final"
    weights = {p.relative_to(final): p.read_bytes() for p in final.rglob("*.safetensors")}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in m.items() if not k.startswith("time/")} for m in metrics]
    texts = [(run / name).read_text() for name in ("samples.jsonl", "evaluations.jsonl")]
    return weights, metrics, texts


def cut_off(tmp_path, run=RUN, after=3, **changes):
    with pytest.raises(ZeroDivisionError):
        make(tmp_path, run, Stop(after), **changes).train()


@pytest.mark.parametrize(
    ("run", "changes"),
    [
        (RUN, {"critic": "adapter", "eval_steps": 2}),
        (RUN, {"use_peft": False, "train_layers": "all", "optim": "adamw_torch"}),
        (RUN, {"use_peft": False, "optim": "adamw_bnb_8bit", "lora_rank": 64}),
        (RUN, {"bf16": True, "use_peft": False, "train_layers": "all", "eval_prompts": 4}),
        (RUN, {"quantization": "nf4", "algorithm": "ppo_kl"}),
        (GROUPS, {}),
    ],
    ids=["adapters", "full-torch", "top-bnb", "full-bf16", "nf4-ppo_kl", "dapo"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, run, changes):
    free = str(tmp_path / "free")
    make(tmp_path, run, output_dir=free, **changes).train()
    cut_off(tmp_path, run, **changes)
    summary = make(tmp_path, run, **changes).train(resume_from_checkpoint=True)
    assert summary.steps == 4
    for ours, theirs in zip(kept(tmp_path / "run"), kept(Path(free)), strict=True):
        assert ours == theirs
    assert len(kept(Path(free))[1]) == 4
    assert not (tmp_path / "run/checkpoints/interrupted").exists()


@pytest.mark.slow
def test_kill_minus_nine_ten_times(tmp_path):
    tiny.folder(tmp_path / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    script = str(Path(__file__).parent / "killed_run.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hits = json.loads(done.stdout)
    assert sum(hit["killed"] for hit in hits) >= 8
    # Some hit a checkpoint that was being written, some after others were there.
    assert any(name.startswith(".step-") for hit in hits for name in hit["there"])
    assert any(name.startswith("step-") for hit in hits for name in hit["there"])
    assert kept(tmp_path / "killed") == kept(tmp_path / "free")
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        best = [tmp_path / run / "checkpoints/best" / name for run in ("killed", "free")]
        assert best[0].read_bytes() == best[1].read_bytes()
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys):
    make(tmp_path, output_dir=str(tmp_path / "free")).train()
    cut_off(tmp_path, after=4, save_steps=1)
    newest = tmp_path / "run/checkpoints/step-000003/optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    make(tmp_path, save_steps=1).train(resume_from_checkpoint=True)
    told = capsys.readouterr().err
    assert "step-000003 is damaged: optimizer.safetensors" in told
    assert "going on after step 2" in told
    assert kept(tmp_path / "run") == kept(tmp_path / "free")


@pytest.mark.parametrize("after", [1, 3])
def test_a_trainer_that_has_trained_is_not_started_over(tmp_path, after):
    """No checkpoint has what its weights, optimizer and generators were before."""
    stop = Stop(after)
    live = make(tmp_path, RUN, stop, save_steps=10)
    with pytest.raises(ZeroDivisionError):
        live.train()
    stop.after = None
    with pytest.raises(UserError, match="make it anew"):
        live.train(resume_from_checkpoint=True)
    make(tmp_path, RUN, save_steps=10).train(resume_from_checkpoint=True)
    make(tmp_path, RUN, output_dir=str(tmp_path / "free"), save_steps=10).train()
    assert kept(tmp_path / "run") == kept(tmp_path / "free")


class Satisfied(TrainerCallback):
    """Ends the run in its third evaluation along it; ``breaks``: is then broken off."""

    def __init__(self, breaks=False):
        self.breaks = breaks

    def on_evaluate(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 3

    def on_train_end(self, args, state, control, **_):
        if self.breaks:
            raise ZeroDivisionError


def test_an_evaluation_that_ended_a_run_is_not_made_again(tmp_path):
    free = str(tmp_path / "free")
    ended = make(tmp_path, RUN, Satisfied(), output_dir=free, eval_steps=1).train()
    with pytest.raises(ZeroDivisionError):
        make(tmp_path, RUN, Satisfied(breaks=True), eval_steps=1).train()
    again = make(tmp_path, eval_steps=1)
    again.evaluate = None
    summary = again.train(resume_from_checkpoint=True)
    assert summary.steps == ended.steps == 3 and summary.score_after == ended.score_after
    assert kept(tmp_path / "run") == kept(tmp_path / "free")


def test_with_none_left_it_is_an_error(tmp_path):
    cut_off(tmp_path)
    (tmp_path / "run/checkpoints/step-000002/state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json.*no other is whole"):
        make(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, r"another learning_rate \(it is 0.01, not 0.001\)"),
        ({"total_episodes": 96}, "learning rate falls to zero at 64"),
        ({"seed": 2, "lam": 0.5}, "another seed .*, lam .* leave them out"),
    ],
)
def test_another_configuration_is_refused(tmp_path, changes, message):
    cut_off(tmp_path)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        make(tmp_path, **changes).train(resume_from_checkpoint=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_another_model_is_refused(tmp_path):
    cut_off(tmp_path)
    tiny.model(seed=3).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="another model: the base's weights differ"):
        make(tmp_path).train(resume_from_checkpoint=True)
    tiny.model(intermediate_size=48).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="another model: its configuration differs"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_a_constant_learning_rate_lets_a_run_grow(tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    make(tmp_path, output_dir=str(tmp_path / "free"), total_episodes=96, **constant).train()
    make(tmp_path, **constant).train()
    make(tmp_path, total_episodes=96, **constant).train(resume_from_checkpoint=True)
    assert kept(tmp_path / "run")[:2] == kept(tmp_path / "free")[:2]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_signal_waits_for_the_step_and_leaves_a_checkpoint(tmp_path, capsys, number, status):
    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    make(tmp_path, output_dir=str(tmp_path / "free")).train()
    before = signal.getsignal(number)
    with pytest.raises(SystemExit if status else KeyboardInterrupt) as stopped:
        make(tmp_path, RUN, Signal()).train()
    if status:
        assert stopped.value.code == status
    assert signal.getsignal(number) == before
    assert "go on with: train(resume_from_checkpoint=" in capsys.readouterr().err
    there = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert there == ["step-000002", "step-000003"]
    make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "run"))
    assert kept(tmp_path / "run") == kept(tmp_path / "free")


class Counting:
    """A reward with something to carry: how often it was asked."""

    __name__ = "counting"

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **_):
        self.calls += 1
        return [text.count("e") / 8 + self.calls / 100 for text in completions]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_what_a_reward_function_carries_is_kept(tmp_path):
    first = make(tmp_path, RUN, Stop(3))
    first.reward.objectives[0] = replace(first.reward.objectives[0], function=Counting())
    with pytest.raises(ZeroDivisionError):
        first.train()
    again = make(tmp_path)
    counting = Counting()
    again.reward.objectives[0] = replace(again.reward.objectives[0], function=counting)
    steps = []
    again.callbacks("on_train_begin")
    again.keeper.begin(True)
    steps.append(counting.calls)
    # The evaluation before training and two rollouts.
    assert steps == [3]


def test_a_resume_leaves_the_users_files_and_no_final_of_before(tmp_path):
    grown = replace(RUN, lr_scheduler_type="constant")
    make(tmp_path, grown).train()
    (tmp_path / "run/notes.jsonl").write_text("{}\n")
    assert (tmp_path / "run/checkpoints/final").exists()
    again = make(tmp_path, grown, Stop(6), total_episodes=112)
    with pytest.raises(ZeroDivisionError):
        again.train(resume_from_checkpoint=True)
    assert (tmp_path / "run/notes.jsonl").read_text() == "{}\n"
    assert not (tmp_path / "run/checkpoints/final").exists()


def test_other_columns_are_other_data(tmp_path):
    cut_off(tmp_path)
    again = make(tmp_path)
    rows = [row | {"answer": "a"} for row in PROMPTS]
    again = type(again)(None, letters, again.config, rows)
    with pytest.raises(UserError, match="is of other prompts"):
        again.train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_that_was_chosen_names_the_others(tmp_path):
    cut_off(tmp_path, after=5, total_episodes=96)
    chosen = tmp_path / "run/checkpoints/step-000004"
    (chosen / "state.json").write_text("{}")
    with pytest.raises(UserError, match="choose another: step-000002"):
        make(tmp_path, total_episodes=96).train(resume_from_checkpoint=chosen)


def test_what_came_from_python_is_not_taken_from_the_settings(tmp_path):
    """The reward of `make` is a function: on the command line the run would go on with another."""
    cut_off(tmp_path)
    again = make(tmp_path)
    again.folder.given = dict.fromkeys(again.folder.given)
    with pytest.raises(UserError, match=r"was given its (train dataset|reward) from Python"):
        again.train(resume_from_checkpoint=True)
    make(tmp_path).train(resume_from_checkpoint=True)


def test_a_gold_judges_own_state_is_kept():
    first, again = (HackingMonitor(PPOConfig(), Counting()) for _ in range(2))
    first.gold.judge(["a"], ["b"], [[1]], [{}])
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    (objective,) = again.gold.objectives
    assert objective.function.calls == 1
