"""Training a reward model: it learns, its gradient is the loss's, and it says when it fails."""

import json
import os
import random
import signal

import pytest
import tiny
import torch

from fastrlhf.backbone import SharedBackbone
from fastrlhf.comparisons import Comparison
from fastrlhf.errors import UserError
from fastrlhf.reward_config import RewardConfig
from fastrlhf.reward_trainer import RewardTrainer
from fastrlhf.rewards.model import RewardModel
from fastrlhf.rewards.preference_loss import bradley_terry

GOOD, BAD = "abcde", "vwxyz"


def words(rng, good, n=8):
    kinds = [GOOD] * good + [BAD] * (n - good)
    rng.shuffle(kinds)
    return "".join(rng.choice(kind) for kind in kinds)


def pairs(count=96, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt": "the ", "chosen": words(rng, 6), "rejected": words(rng, 2)} for _ in range(count)
    ]


def ratings(count=120, seed=0):
    rng = random.Random(seed)
    goods = [rng.randrange(9) for _ in range(count)]
    return [{"completion": words(rng, good) + " ", "rating": good / 2} for good in goods]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.folder(tmp_path_factory.mktemp("base")))


def trainer(base, tmp_path, rows=None, **settings):
    given = {
        "train_layers": 2, "learning_rate": 3e-3, "head_learning_rate": 3e-3, "batch_size": 16,
        "num_train_epochs": 2, "warmup_steps": 0, "output_dir": str(tmp_path / "run"),
    } | settings  # fmt: skip
    return RewardTrainer(base, RewardConfig(**given), pairs() if rows is None else rows)


@pytest.mark.parametrize("rows", [pairs(240), ratings(160)], ids=["pairs", "ratings"])
def test_it_learns_what_is_preferred(base, tmp_path, rows):
    made = trainer(base, tmp_path, rows)
    summary = made.train()
    assert summary.accuracy > 0.75
    assert summary.gap == pytest.approx(summary.train_accuracy - summary.accuracy)
    run = tmp_path / "run"
    evaluations = [json.loads(x) for x in (run / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == made.steps
    best = min(evaluations, key=lambda x: x["held_out/loss"])
    assert summary.best_step == best["step"] and summary.loss == best["held_out/loss"]
    assert (run / "calibration.png").read_bytes().startswith(b"\x89PNG")
    # Normalised on the training texts.
    scores = made.states.all_scores(range(len(made.train_set.tokens)))
    assert abs(float(scores.mean())) < 1e-4 and abs(float(scores.std()) - 1) < 1e-4
    reward = made.reward_model()
    good, bad = reward(prompts=["the "] * 2, completions=["abcdeabc", "vwxyzvwx"])
    assert good > bad


def test_microbatches_change_nothing(base, tmp_path):
    gradients = []
    for tokens in (4096, 40):
        made = trainer(base, tmp_path, microbatch_tokens=tokens, head_start=False)
        made.make_states()
        torch.manual_seed(3)
        for p in made.backbone.trainable():
            torch.nn.init.normal_(p, std=0.2)
        batch = next(iter(made.train_set.batches(12, torch.Generator().manual_seed(0))))
        scores, loss = made.backward(batch)
        gradients.append([p.grad.clone() for p in made.backbone.trainable()] + [scores, loss])
        expected = made.states.all_scores(batch.texts.tolist())
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        chosen, rejected = scores[batch.chosen], scores[batch.rejected]
        torch.testing.assert_close(loss, bradley_terry(chosen, rejected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_margins_of_pairs_count_and_of_ratings_when_asked(base, tmp_path):
    scores = torch.tensor([1.0, 0.0])
    batch = Comparison(
        torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1]), torch.tensor([2.0])
    )
    of_pairs = trainer(base, tmp_path).loss(scores, batch)
    of_ratings = trainer(base, tmp_path, ratings()).loss(scores, batch)
    asked = trainer(base, tmp_path, ratings(), rating_margin=0.5).loss(scores, batch)
    assert of_pairs > asked > of_ratings
    torch.testing.assert_close(asked, bradley_terry(scores[:1], scores[1:], margin=1.0))


def test_only_the_reward_role_trains(base, tmp_path):
    made = trainer(base, tmp_path)
    before = {n: p.detach().clone() for n, p in made.backbone.named_parameters()}
    made.train()
    assert not (tmp_path / "run/.lock").exists(), "a run that has ended holds its folder"
    changed = {n for n, p in made.backbone.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".reward." in n or n.startswith("reward_head") for n in changed)


def test_noise_is_not_learnt_for_long(base, tmp_path):
    rng = random.Random(0)
    noise = [{"chosen": words(rng, 4), "rejected": words(rng, 4)} for _ in range(60)]
    settings = {"num_train_epochs": 30, "learning_rate": 1e-2, "batch_size": 8}
    summary = trainer(base, tmp_path, noise, **settings).train()
    assert summary.stopped and "held-out loss" in summary.stopped
    assert summary.steps < 30 * 6 and summary.best_step < summary.steps
    gap = trainer(base, tmp_path / "gap", noise, max_gap=0.05, **settings).train()
    assert gap.stopped and "gap" in gap.stopped


def test_the_best_weights_are_kept(base, tmp_path):
    rng = random.Random(0)
    noise = [{"chosen": words(rng, 4), "rejected": words(rng, 4)} for _ in range(60)]
    made = trainer(
        base, tmp_path, noise, num_train_epochs=6, learning_rate=1e-2, batch_size=8, normalize=False
    )
    summary = made.train()
    from fastrlhf.rewards.preference_loss import measure

    scores = made.states.all_scores(range(len(made.train_set.tokens), len(made.states.tokens)))
    stats = measure(scores, made.held_out.pairs())
    assert stats.loss / stats.pairs == pytest.approx(summary.loss, rel=1e-4)


def test_what_cannot_be_trained_on(base, tmp_path):
    with pytest.raises(UserError, match="too few to hold out 5"):
        trainer(base, tmp_path, pairs(4), eval_rows=5)
    with pytest.raises(UserError, match="reward=True"):
        backbone = SharedBackbone(tiny.model(), critic=None, tokenizer=tiny.tokenizer())
        trainer(backbone, tmp_path)
    with pytest.raises(UserError, match="takes a RewardConfig"):
        RewardTrainer(base, args=object())  # type: ignore[arg-type]


def test_held_out_preferences_of_ones_own(base, tmp_path):
    config = RewardConfig(output_dir=str(tmp_path / "run"), train_layers=2)
    made = RewardTrainer(base, config, pairs(8), pairs(5, seed=1))
    assert len(made.train_set) == 8 and len(made.held_out) == 5


def test_the_last_weights_are_evaluated_where_batches_compare_nothing(base, tmp_path):
    rng = random.Random(0)
    # Of each prompt two texts, which a batch may hold one of: such batches are skipped.
    rows = [
        {"prompt": f"{a}{b} ", "completion": words(rng, good), "rating": float(good)}
        for a in "abcdefgh"
        for b in "abcdefgh"
        for good in (7, 1)
    ]
    rows += [
        {"prompt": f"{a}{b}{a} ", "completion": words(rng, 4), "rating": 4.0}
        for a in "abcdefgh"
        for b in "abcdefgh"
    ]
    made = trainer(base, tmp_path, rows, batch_size=1, num_train_epochs=1, head_start=False)
    summary = made.train()
    assert 0 < summary.steps < made.steps
    lines = (tmp_path / "run/evaluations.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [0, summary.steps]
    assert json.loads(lines[-1])["epoch"] == 1 and summary.best_step == summary.steps
    often = trainer(base, tmp_path / "often", rows, batch_size=1, num_train_epochs=1, eval_steps=25)
    steps = often.train().steps
    lines = (tmp_path / "often/run/evaluations.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == sorted({*range(0, steps, 25), steps})


def test_ratings_too_close_to_evaluate_are_named_before_training(base, tmp_path):
    with pytest.raises(UserError, match=r"held out, .*eval_rating_gap \(5\)"):
        trainer(base, tmp_path, ratings(), eval_rating_gap=5.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_best_is_saved_whatever_ends_the_run(base, tmp_path, error):
    made = trainer(base, tmp_path, eval_steps=1)
    steps = []

    def step(number, *rest):
        if number == 4:
            raise error("stop")
        steps.append(number)
        return RewardTrainer.step(made, number, *rest)

    made.step = step
    with pytest.raises(error):
        made.train()
    folder = tmp_path / "run/model"
    facts = json.loads((folder / "reward.json").read_text())
    assert steps == [1, 2, 3] and facts["step"] == made.best["step"] and not facts["normalized"]
    texts = ["the abc", "the vwx"]
    expected = made.reward_model().scores(texts).tolist()
    assert RewardModel.from_pretrained(folder).scores(texts).tolist() == pytest.approx(expected)
    assert not list(folder.parent.glob(".model*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
@pytest.mark.parametrize("at", [4, 10], ids=["step", "last evaluation"])
def test_a_signal_waits_for_the_step_and_leaves_the_best(
    base, tmp_path, capsys, number, status, at
):
    made = trainer(base, tmp_path, eval_steps=2)
    assert made.steps == 10
    name = "step" if at < made.steps else "evaluate"
    original, done = getattr(made, name), []

    def signalled(step, *given):
        if step == at:
            os.kill(os.getpid(), number)
        found = original(step, *given)
        done.append(step)
        return found

    setattr(made, name, signalled)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit if status else KeyboardInterrupt) as stopped:
        made.train()
    if status:
        assert stopped.value.code == status
    assert signal.getsignal(number) == before
    # What was under way is done, and nothing after it.
    assert done[-1] == at
    told = capsys.readouterr().err
    assert "the best weights so far (step" in told and "cannot be gone on with" in told
    facts = json.loads((tmp_path / "run/model/reward.json").read_text())
    assert facts["step"] == made.best["step"] and not facts["normalized"]
    assert len(RewardModel.from_pretrained(tmp_path / "run/model").scores(["abc"])) == 1
    assert not (tmp_path / "run/summary.json").exists()


def test_a_model_that_cannot_be_normalised_is_saved(base, tmp_path, monkeypatch):
    def fails(*_):
        raise UserError("every reference text has the same reward")

    monkeypatch.setattr("fastrlhf.reward_trainer.normalize_head", fails)
    with pytest.raises(UserError, match="same reward"):
        trainer(base, tmp_path, num_train_epochs=1).train()
    assert len(RewardModel.from_pretrained(tmp_path / "run/model").scores(["abc"])) == 1


def test_the_data_set_is_called_what_it_is(base, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(20)))
    assert trainer(base, tmp_path, str(path)).dataset == str(path)
    made = trainer(base, tmp_path, pairs(40), num_train_epochs=1)
    made.train()
    facts = json.loads((tmp_path / "run/model/reward.json").read_text())
    assert facts["dataset"] == "rows from Python" and facts["normalized"]
