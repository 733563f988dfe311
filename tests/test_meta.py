"""Meta-training: the update is the papers', one backbone serves all, and it pays on new tasks."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from test_resume import Stop, kept

from fastrlhf import MetaConfig, MetaTrainer, PPOConfig, PPOTrainer, SelfCheckError, UserError
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.cli import main
from fastrlhf.export import export_run
from fastrlhf.meta_tasks import deal
from fastrlhf.optim import make_optimizer, make_schedule
from fastrlhf.rewards.functions import RewardScorer
from fastrlhf.run_checkpoints import resume_command

PROMPTS = [{"prompt": a + b} for a in "abcdefgh" for b in "ijklmnop"]
SETTINGS = dict(
    meta_steps=2, meta_batch_size=2, inner_steps=2, batch_size=16, num_generations=4,
    response_length=6, stop_token=None, learning_rate=1e-2, kl_coef=0.02, train_layers=2,
    lora_rank=8, microbatch_tokens=80, eval_prompts=4, num_samples=0, save_steps=1, seed=3,
)  # fmt: skip
PPO = dict(algorithm="ppo", num_generations=1, num_mini_batches=2)


def share(*letters):
    def reward(completions, **_):
        return [sum(text.count(x) for x in letters) / 6 for text in completions]

    return reward


TASKS = {"a": share("a"), "b": share("e", "b"), "c": share("c")}


def make(tmp_path, tasks=None, callbacks=(), eval_tasks=None, **changes):
    if not (tmp_path / "model").exists():
        tiny.folder(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "run"), **changes}
    config = MetaConfig(**SETTINGS | given)
    given = dict(callbacks=callbacks, eval_tasks=eval_tasks)
    return MetaTrainer(None, tasks or TASKS, config, PROMPTS, **given)


def by_hand(trainer):
    """The weights before a first meta step and after it, by a plain trainer's steps."""
    config, lr = trainer.config, trainer.config.outer_rate
    beside = replace(config, output_dir=f"{config.output_dir}-2")
    plain = PPOTrainer(None, share("z"), beside, PROMPTS)
    plain.folder.make()
    weights = plain.backbone.trainable()
    theta = [p.detach().clone() for p in weights]
    found = []
    for turn in next(deal(trainer.tasks, config)):
        for p, x in zip(weights, theta, strict=True):
            p.data.copy_(x)
        plain.optimizer = plain.updater.optimizer = make_optimizer(weights, config)
        plain.schedule = plain.updater.schedule = make_schedule(plain.optimizer, config)
        plain.sampler.reward = RewardScorer(TASKS[turn.task.name], config)
        for batch in turn.batches[: config.inner_steps]:
            plain.step(2, batch)
        phi = [p.detach().clone() for p in weights]
        if config.method == "fomaml":
            found.append(gradient_by_hand(plain, weights, turn.batches[-1]))
        else:
            found.append(phi)
    mean = [sum(parts) / len(parts) for parts in zip(*found, strict=True)]
    if config.method == "reptile":
        return theta, [t + lr * (m - t) for t, m in zip(theta, mean, strict=True)]
    # Adam's first step, its moments corrected, goes along the gradient's sign.
    ends = zip(theta, mean, strict=True)
    return theta, [t - lr * g / (g.abs() + config.adam_eps) for t, g in ends]


def gradient_by_hand(plain, weights, batch):
    """The mean of what an optimizer that steps by nothing is given in one pass over a rollout."""
    plain.updater.optimizer = still = torch.optim.SGD(weights, lr=0.0)
    seen = []
    still.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in weights]))
    config = plain.config
    plain.config = replace(config, num_ppo_epochs=1)
    plain.step(2, batch)
    plain.config = config
    assert len(seen) == config.num_mini_batches
    return [sum(parts) / len(parts) for parts in zip(*seen, strict=True)]


@pytest.mark.parametrize(
    ("method", "lr", "changes"),
    [("reptile", 0.5, {}), ("reptile", 1.0, PPO), ("fomaml", 0.01, {}), ("fomaml", 0.01, PPO)],
)
def test_the_update_is_that_of_the_papers(tmp_path, method, lr, changes):
    trainer = make(tmp_path, method=method, meta_learning_rate=lr, **changes)
    trainer.folder.make()
    theta, expected = by_hand(trainer)
    for p, x in zip(trainer.weights, theta, strict=True):
        assert torch.equal(p, x)
    line = trainer.step(1, next(trainer.batches()))
    for wanted, got in zip(expected, trainer.weights, strict=True):
        off = (got.detach() - wanted).abs()
        if method == "reptile":
            assert off.max() < 1e-6
        else:
            # The sign of a gradient is not known where it is below its own rounding.
            assert (off > 1e-2 * lr).float().mean() < 0.01
    moved = sum(float((x - t).norm()) for x, t in zip(expected, theta, strict=True))
    assert moved > 0.05 and line["meta/direction_norm"] > 0.01
    assert trainer.outer.rate == lr / 2  # linear, of two meta steps


def test_nothing_else_changes(tmp_path):
    backbone = SharedBackbone(
        tiny.model(), lora=LoraSettings(8, 32.0), train_layers=2, critic=None,
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    backbone.add_policy("other")
    backbone.train_roles("policy")
    config = MetaConfig(**SETTINGS, output_dir=str(tmp_path / "run"))
    trainer = MetaTrainer(backbone, TASKS, config, PROMPTS, eval_tasks={"d": share("d")})
    every = dict(backbone.named_parameters())
    before = {name: p.detach().clone() for name, p in every.items()}
    state = trainer.generator.get_state(), trainer.shuffler.get_state()
    curve = trainer.adapt("d", save_to=tmp_path / "adapted")
    assert curve.steps == [0, 1, 2] and len(curve.scores) == 3
    assert all(torch.equal(p, before[name]) for name, p in every.items())
    assert (tmp_path / "adapted/adapter_model.safetensors").exists()
    assert trainer.adapt(share("d"), 2, every=2).scores == curve.scores[::2]
    assert all(
        torch.equal(a, b.get_state())
        for a, b in zip(state, (trainer.generator, trainer.shuffler), strict=True)
    )
    trainer.train()
    lines = (tmp_path / "run/curves.jsonl").read_text().splitlines()
    curves = [json.loads(line) for line in lines]
    assert [(x["step"], x["task"], x["after"]) for x in curves] == [
        (0, "d", [0, 1, 2]),
        (2, "d", [0, 1, 2]),
    ]
    # Before training, the curve is that of the base.
    assert curves[0]["score"] == curve.scores
    changed = {name for name, p in every.items() if not torch.equal(p, before[name])}
    assert changed and all("default" in name for name in changed)
    # The reference is the base in every adaptation.
    assert backbone.roles["reference"] == ()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    class Total:
        """A reward that carries something: the completions it has seen."""

        __name__ = "total"
        seen = 0

        def __call__(self, completions, **_):
            self.seen += len(completions)
            return [text.count("e") / 6 + self.seen / 1000 for text in completions]

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    changes = dict(method="fomaml", meta_steps=3, meta_learning_rate=0.01, inner_steps=1)
    changes |= dict(reward_normalization="running", eval_steps=1)

    def run(folder, *callbacks, **train):
        tasks = {"a": share("a"), "total": Total(), "c": share("c")}
        trainer = make(tmp_path, tasks, callbacks, output_dir=str(tmp_path / folder), **changes)
        trainer.train(**train)

    run("free")
    with pytest.raises(ZeroDivisionError):
        run("run", Stop(2))
    run("run", resume_from_checkpoint=True)
    for ours, theirs in zip(kept(tmp_path / "run"), kept(tmp_path / "free"), strict=True):
        assert ours == theirs
    for name in ("adaptations.jsonl", "curves.jsonl"):
        lines = [(tmp_path / x / name).read_text().splitlines() for x in ("run", "free")]
        ours, theirs = (
            [{k: v for k, v in json.loads(x).items() if "time/" not in k} for x in each]
            for each in lines
        )
        assert ours == theirs and len(ours) == {"adaptations.jsonl": 12, "curves.jsonl": 12}[name]
    with pytest.raises(UserError, match=r"of the tasks a, total, c, not of c, a"):
        tasks = {"c": share("c"), "a": share("a")}
        make(tmp_path, tasks, **changes).train(resume_from_checkpoint=True)


def test_any_run_starts_from_the_initialisation(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    final = tmp_path / "run/checkpoints/final"
    config = PPOConfig(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "next"), adapter=str(final),
        total_episodes=32, batch_size=16, response_length=6, train_layers=2, eval_prompts=8,
    )  # fmt: skip
    later = PPOTrainer(None, share("a"), config, PROMPTS)
    ours = list(trainer.backbone.adapters.parameters("default"))
    theirs = list(later.backbone.adapters.parameters("default"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    later.folder.make()
    # There, the reference is the initialisation itself.
    assert later.backbone.roles["reference"] == ("reference",)
    assert later.evaluate("before", step=0).kl == 0


def test_a_run_that_has_ended_deals_no_more(tmp_path):
    trainer = make(tmp_path)
    assert len(list(trainer.batches(1))) == 1
    trainer.keeper.end.reason = "it was asked for"
    assert list(trainer.batches(1)) == []


def test_what_an_adaptation_refuses_before_it_begins(tmp_path):
    trainer = make(tmp_path, lr_scheduler_type="linear")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine is there already; give a new folder"):
        trainer.adapt("a", save_to=tmp_path / "mine")
    with pytest.raises(UserError, match=r"steps is 3, and lr_scheduler_type linear is at 0"):
        trainer.adapt("a", steps=3)
    with pytest.raises(UserError, match="eval_adaptation is 4"):
        make(tmp_path, lr_scheduler_type="linear", eval_adaptation=4)


def test_its_run_is_exported_and_not_judged(tmp_path, capsys):
    make(tmp_path, meta_steps=1).train()
    export_run(tmp_path / "run", tmp_path / "plain")
    assert (tmp_path / "plain/model.safetensors").exists()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "trained what other runs begin from" in capsys.readouterr().err


def broken_for(trainer, *names):
    """Gradients that are NaN while one of these tasks is adapted to."""
    original = trainer.updater.step_at_the_end

    def step(losses, check):
        if trainer.sampler.reward.name not in names:
            return original(losses, check)
        handle = trainer.weights[1].register_hook(lambda g: g * torch.nan)
        try:
            return original(losses, check)
        finally:
            handle.remove()

    trainer.updater.step_at_the_end = step


def named(**rewards):
    for name, reward in rewards.items():
        reward.__name__ = name
    return rewards


def test_a_task_that_meets_a_nan_is_left_out(tmp_path, capsys):
    tasks = named(good=share("a"), bad=share("b"))
    trainer = make(tmp_path, tasks=tasks)
    broken_for(trainer, "bad")
    start = [p.detach().clone() for p in trainer.weights]
    trainer.train()
    metrics = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["check/skipped_tasks"] for line in metrics] == [1, 2]
    told = capsys.readouterr().err
    assert "task 'bad' is left out of this meta step: the gradient of" in told and "lora_" in told
    assert "adapting to 'bad' broke off" in told
    # What is left is the other task's own direction, in full.
    alone = make(tmp_path, tasks=tasks, output_dir=str(tmp_path / "alone"))
    alone.folder.make()
    turns = [turn for turn in next(alone.batches()) if turn.task.name == "good"]
    again = make(tmp_path, tasks=tasks, output_dir=str(tmp_path / "again"))
    broken_for(again, "bad")
    again.folder.make()
    order = sorted(next(again.batches()), key=lambda turn: turn.task.name != "good")
    alone.step(1, turns)
    again.step(1, order)
    assert all(torch.equal(a, b) for a, b in zip(alone.weights, again.weights, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start, again.weights, strict=True))


def test_several_in_a_row_stop_the_run_where_it_was(tmp_path):
    tasks = named(good=share("a"), bad=share("b"))
    trainer = make(tmp_path, tasks=tasks)
    broken_for(trainer, "good", "bad")
    with pytest.raises(SelfCheckError, match="3 adaptations in a row broke off"):
        trainer.train()
    first = make(tmp_path, tasks=tasks, output_dir=str(tmp_path / "other"))
    assert all(torch.equal(a, b) for a, b in zip(first.weights, trainer.weights, strict=True))
    assert (tmp_path / "run/checkpoints/interrupted/adapter_model.safetensors").exists()
    again = resume_command(trainer.config, tmp_path / "run", {})
    assert again == f"train(resume_from_checkpoint={str(tmp_path / 'run')!r})"


def test_bad_adaptations(tmp_path):
    with pytest.raises(UserError, match="MetaTrainer takes a MetaConfig, not a PPOConfig"):
        MetaTrainer(None, TASKS, PPOConfig(), PROMPTS)
    trainer = make(tmp_path)
    with pytest.raises(UserError, match="steps is 0; give at least 1"):
        trainer.adapt("a", 0)
    with pytest.raises(UserError, match="no reward 'aa'"):
        trainer.adapt("aa")


def both(letter):
    """Half the score is for e's, which all tasks want, half for a letter of the task's own."""

    def reward(completions, **_):
        return [(min(x.count("e"), 4) + min(x.count(letter), 4)) / 8 for x in completions]

    return reward


@pytest.mark.parametrize(("method", "seed"), [("reptile", 1), ("reptile", 2), ("fomaml", 1)])
def test_a_held_out_task_is_learnt_sooner(tmp_path, method, seed):
    changes = dict(
        method=method, seed=seed, meta_steps=5, meta_batch_size=3, batch_size=32, eval_prompts=16,
        meta_learning_rate=0.02 if method == "fomaml" else 1.0, response_length=8,
        microbatch_tokens=10**4, save_steps=None, eval_adaptation=5,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tasks, held_out = {x: both(x) for x in "acg"}, {"m": both("m")}
        trainer = make(tmp_path, tasks, eval_tasks=held_out, **changes)
        summary = trainer.train()
    finally:
        torch.set_num_threads(threads)
    lines = (tmp_path / "run/curves.jsonl").read_text().splitlines()
    before, after = (json.loads(line)["score"] for line in lines)
    assert steps_to(0.3, after) + 2 <= steps_to(0.3, before)
    assert (summary.score_before, summary.score_after) == (before[-1], after[-1])
    assert summary.score_after > summary.score_before


def steps_to(score, curve):
    """Rollouts until the curve reaches the score; one more than it has where it does not."""
    return next((i for i, x in enumerate(curve) if x >= score), len(curve))
