"""`fastrlhf pareto`: its ends are the trained policies, and what was done is not done again."""

import json
import os
import shutil

import pytest
import tiny
from peft import PeftModel

from fastrlhf import pareto_plot
from fastrlhf.cli import main
from fastrlhf.config import PPOConfig
from fastrlhf.errors import UserError
from fastrlhf.pareto import dominated, pareto_front

SETTINGS = dict(
    model="model", dataset="prompts.jsonl", total_episodes=160, batch_size=32, num_ppo_epochs=2,
    response_length=8, train_layers=2, eval_prompts=24, learning_rate="2e-2", kl_coef=0.02,
    num_samples=0, lora_rank=4, save_steps=1,
)  # fmt: skip
COMMON = [f"{key}={value}" for key, value in SETTINGS.items()]
REWARDS = ["mine.py:letters", "mine.py:others"]
ASKED = ["--rewards", *REWARDS, *COMMON, "--points", "3", "--output", "front"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pareto")
    tiny.folder(path / "model")
    prompts = [json.dumps({"prompt": a + b}) for a in "abcdefgh" for b in "ijklmnop"]
    (path / "prompts.jsonl").write_text("\n".join(prompts))
    (path / "mine.py").write_text(
        "def letters(completions, **_):\n    return [c.count('e') / 4 for c in completions]\n"
        "def others(completions, **_):\n    return [c.count('o') / 4 for c in completions]\n"
        "def nothing(completions, **_):\n    return [None for c in completions]\n"
    )
    before = os.getcwd()
    os.chdir(path)
    try:
        assert main(["pareto", *ASKED]) == 0
    finally:
        os.chdir(before)
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def ran(*words):
        status = main(["pareto", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return ran


def kept(folder):
    return json.loads((folder / "front/pareto.json").read_text())


def evaluations(folder, run):
    text = (folder / "front" / run / "evaluations.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(("place", "run"), [(0, "mine-py-letters"), (-1, "mine-py-others")])
def test_the_ends_are_the_trained_policies(folder, place, run):
    """They say again what they said at their trainings' ends: same prompts, same seeds."""
    front, before, after = kept(folder), *evaluations(folder, run)
    end, own = front["points"][place], 0 if place == 0 else 1
    assert end["weights"] == [1 - own, own]
    assert end["scores"][own]["value"] == pytest.approx(after["score"], abs=1e-6)
    assert end["kl"] == pytest.approx(after["kl"], rel=1e-3) and after["kl"] > 0.1
    assert end["entropy"] == pytest.approx(after["entropy"], rel=1e-3)
    assert front["base"]["scores"][own]["value"] == pytest.approx(before["score"], abs=1e-6)
    assert front["base"]["kl"] == 0
    # Each has learnt its own reward, or the test would say little.
    assert after["score"] > before["score"] + 0.05


def test_what_it_leaves_behind(folder):
    front = kept(folder)
    assert [x["weights"] for x in front["points"]] == [[1, 0], [0.5, 0.5], [0, 1]]
    assert (folder / "front/pareto.png").read_bytes().startswith(b"\x89PNG")
    values = [[s["value"] for s in x["scores"]] for x in front["points"]]
    assert [x["dominated"] for x in front["points"]] == dominated(values)
    for x in front["points"]:
        assert all(s["low"] <= s["value"] <= s["high"] for s in x["scores"])
        model = PeftModel.from_pretrained(tiny.model(), str(folder / x["adapter"]))
        assert model.peft_config["default"].r == 8
    lines = [json.loads(x) for x in (folder / "front/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 24 * 4 == front["prompts"] * 4
    middle = [x for x in lines if x["weights"] == [0.5, 0.5]]
    mean = sum(x["scores"]["mine.py:others"] for x in middle) / 24
    assert mean == pytest.approx(front["points"][1]["scores"][1]["value"], abs=1e-6)


def test_given_again_it_goes_on(run, folder):
    """One run is whole and is not trained again, one was broken off and comes to the same."""
    shutil.copytree(folder / "front", folder / "again")
    broken = folder / "again/mine-py-others"
    (broken / "summary.json").unlink()
    shutil.rmtree(broken / "checkpoints/final")
    shutil.rmtree(broken / "checkpoints/step-000005")
    words = [*ASKED[:-1], "again"]
    for name in ("letters", "others"):
        path = folder / f"again/mine-py-{name}/config.yaml"
        path.write_text(path.read_text().replace("front/", "again/"))
    status, out, err = run(*words)
    assert status == 0, err
    assert "again/mine-py-letters is trained" in err and "going on after step 4" in err
    for ours, theirs in zip(json.loads(out)["points"], kept(folder)["points"], strict=True):
        assert ours["scores"] == theirs["scores"] and ours["kl"] == theirs["kl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rewards", *REWARDS, "sentiment"], "'sentiment' is not a setting"),
        (["--rewards", "sentiment", " sentiment"], "both rewards are 'sentiment'"),
        (["--rewards", *REWARDS, "--points", "1"], "points is 1, but a front has two ends"),
        (["--rewards", *REWARDS, "use_peft=false"], "full training has none; set use_peft: true"),
        (["--rewards", *REWARDS, "adapter=x"], "leave adapter out"),
        (["--rewards", *REWARDS, "reward_weights=[1]"], "leave reward_weights out"),
        (["--rewards", *REWARDS, "reward=x"], "reward is what --rewards gives here"),
        (["--rewards", *REWARDS, "output_dir=x"], "output_dir is what --output gives here"),
        (["--rewards", REWARDS[0], "sentimant"], "did you mean 'sentiment'"),
        (["--rewards", *REWARDS, "--output", "prompts.jsonl"], "cannot be written"),
        (["--rewards", *REWARDS, "kl_coff=1"], "did you mean 'kl_coef'"),
        (["--rewards", *REWARDS, *COMMON, "--output", "front", "lora_rank=8"],
         "the run in front/mine-py-letters cannot go on with another lora_rank (it is 4, not 8)"),
        (["--rewards", "sentiment", REWARDS[1], "--output", "front"],
         "front holds the front between mine.py:letters and mine.py:others; give another --output"),
        (["--rewards", *REWARDS, *COMMON, "--output", "front/mine-py-letters"], "holds a run"),
        (["--rewards", *REWARDS, *COMMON, "--output", "front", "model=other"],
         "cannot go on with another model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(run, folder, words, message):
    before = sorted(folder.rglob("*"))
    status, out, err = run(*words)
    assert status == 2 and out == ""
    (error,) = [line for line in err.splitlines() if line.startswith("fastrlhf: error:")]
    assert message in error and "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


def test_other_points_leave_none_of_before(run, folder):
    shutil.copytree(folder / "front", folder / "fewer")
    for name in ("letters", "others"):
        path = folder / f"fewer/mine-py-{name}/config.yaml"
        path.write_text(path.read_text().replace("front/", "fewer/"))
    (folder / "fewer/points/mine").mkdir()
    words = [*ASKED[:-1], "fewer", "--points", "2"]
    assert run(*words)[0] == 0
    assert {p.name for p in (folder / "fewer/points").iterdir()} == {"1-0", "0-1", "mine"}
    # A front of other prompts than those that the trainings held out would be no front.
    prompts = folder / "prompts.jsonl"
    before = prompts.read_text()
    prompts.write_text(before + '\n{"prompt": "zz"}')
    status, out, err = run(*words)
    prompts.write_text(before)
    assert status == 2 and out == "" and "the data set has changed since the run in fewer/" in err


def test_other_numbers_of_rewards(run, capsys):
    for rewards in (["sentiment"], ["sentiment", "format_match", "repetition"]):
        with pytest.raises(UserError, match=rf"between two rewards, not {len(rewards)} \(sentim"):
            pareto_front(PPOConfig(), rewards)
    with pytest.raises(SystemExit) as ended:
        run("--rewards", "sentiment")
    assert ended.value.code == 2
    assert "argument --rewards: expected 2 arguments" in capsys.readouterr().err


def test_other_algorithms_have_their_own_settings(run):
    """What is wrong is said by the algorithm's verb, so that it was taken for that."""
    status, _, err = run("--rewards", *REWARDS, *COMMON, "algorithm=grpo", "num_generations=5")
    assert status == 2 and "batch_size (32) must be a multiple of num_generations (5)" in err


def test_a_reward_that_judges_nothing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = PPOConfig(**SETTINGS | {"total_episodes": 32, "save_steps": None})
    with pytest.raises(UserError, match="None for every held-out prompt"):
        pareto_front(config, ["mine.py:nothing", "mine.py:others"], 2, folder / "none")


def test_dominated():
    assert dominated([(1, 0), (0, 1), (0.4, 0.4)]) == [False, False, False]
    assert dominated([(1, 0), (1, 0.1), (0.4, 0.1)]) == [True, False, True]
    # Equal points are no better than each other.
    assert dominated([(1, 1), (1, 1)]) == [False, False]


def test_the_picture(folder, monkeypatch):
    """The front's line runs through what is not dominated; what is stays beside it."""
    figures = pytest.importorskip("matplotlib.figure")
    saved = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    front = kept(folder)
    for point, (x, y) in zip(front["points"], [(0, 1), (0.2, 0.2), (1, 0)], strict=True):
        point["scores"] = [{"value": v, "low": v - 0.1, "high": v + 0.1} for v in (x, y)]
        point["dominated"] = x == 0.2
    pareto_plot.draw_front(front, ["letters", "others"], folder / "unseen.png")
    (axes,) = saved[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["front"] == [[0, 1], [1, 0]] and lines["dominated"] == [[0.2, 0.2]]
    assert axes.get_xlabel().endswith("letters") and axes.get_ylabel().endswith("others")
    assert "24 held-out prompts" in axes.get_title(loc="left")
