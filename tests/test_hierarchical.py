"""Both levels on a tiny random model: the best mode depends on the prompt, and is found."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from test_resume import Stop, kept

from fastrlhf import HierarchicalConfig, HierarchicalTrainer, PPOConfig, UserError
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.cli import main
from fastrlhf.export import export_run

PROMPTS = [{"prompt": a + b + 4 * kind} for kind in "xy" for a in "abcdefgh" for b in "ijkl"]
# With larger weights a random model scatters prompts that differ in a letter all over.
WEIGHTS = {"initializer_range": 0.15}
FIT = {"x": "red", "y": "blue"}
FAST = HierarchicalConfig(
    total_episodes=64, batch_size=32, num_mini_batches=2, num_ppo_epochs=2, response_length=6,
    stop_token=None, learning_rate=1e-2, train_layers=2, lora_rank=8, kl_coef=0.02,
    microbatch_tokens=2000, eval_prompts=16, num_samples=0,
    modes={"red": "r", "blue": "b", "plain": ""}, mode_learning_rate=0.05,
)  # fmt: skip


def fitting_e(prompts, completions, mode, **_):
    """Half a point and up to another half for e's where the mode fits the prompt's last letter."""
    rows = zip(prompts, completions, mode, strict=True)
    return [(m == FIT.get(p[-1])) * (0.5 + text.count("e") / 12) for p, text, m in rows]


def trainer(tmp_path, reward=fitting_e, rows=PROMPTS, tokenizer=None, callbacks=(), **changes):
    config = replace(FAST, **{"output_dir": str(tmp_path / "run"), **changes})
    torch.manual_seed(config.seed)
    backbone = SharedBackbone(tiny.model(**WEIGHTS), lora=LoraSettings(8, 32.0), train_layers=2)
    return HierarchicalTrainer(
        backbone, reward, config, rows, processing_class=tokenizer or tiny.tokenizer(),
        callbacks=callbacks,
    )  # fmt: skip


def lines(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]


def test_both_levels_learn_and_the_mode_follows_the_prompt(tmp_path):
    made = trainer(tmp_path, total_episodes=32 * 20, seed=2)
    summary = made.train()
    assert summary.score_before < 0.3
    # A policy that took one mode for all would get 0.5 at best.
    assert summary.score_after > 0.6
    end = [line for line in lines(tmp_path, "samples.jsonl") if line["step"] == 20]
    assert sum(line["mode"] == FIT[line["prompt"][-1]] for line in end) >= 13
    metrics = lines(tmp_path, "metrics.jsonl")
    assert metrics[0]["mode/entropy"] == pytest.approx(1.0986, abs=1e-3)
    assert metrics[-1]["mode/entropy"] < 0.6 and metrics[-1]["mode/share/plain"] < 0.1
    for line in metrics:
        assert sum(line[f"mode/share/{name}"] for name in FAST.modes) == pytest.approx(1)
        assert line["check/first_ratio"] == 1.0 and "mode/advantage_std" in line


def test_rewards_see_the_prompt_and_the_policy_sees_the_instruction(tmp_path):
    told = []

    def reward(prompts, completions, mode, **_):
        told.extend(zip(prompts, mode, strict=True))
        return [1.0] * len(prompts)

    made = trainer(tmp_path, reward)
    batch = made.train_prompts.take(range(32))
    sampled = made.sampler(batch, made.generator)
    prompts, names = sampled.rollout.prompts, list(FAST.modes)
    # The first was the probe, on a made-up prompt.
    assert told[1:] == [
        (t, row["mode"]) for t, row in zip(batch.texts, prompts.columns, strict=True)
    ]
    assert {mode for _, mode in told} == set(names)
    for i, (text, mode) in enumerate(told[1:]):
        ids = prompts.tokens[i][prompts.attention_mask[i]]
        instruction = FAST.modes[mode]
        assert tiny.tokenizer().decode(ids) == f"{instruction} {text}".strip()
    assert sampled.metrics["mode/score/red"] == 1.0


def test_the_instruction_goes_through_the_chat_template(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} z {% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    made = trainer(tmp_path, lambda prompts, **_: [0.0] * len(prompts), rows, tokenizer)
    text = made.train_prompts.texts[0]
    ids = made.engine.prompts.tokens[text, "red"]
    assert tokenizer.decode(ids) == text.replace(" z ", " r z ")
    assert made.engine.prompts.tokens[text, "plain"] == made.train_prompts.tokens[0]


@pytest.mark.parametrize("microbatch_tokens", [4, 2000])
def test_the_high_level_reads_the_references_last_state(tmp_path, microbatch_tokens):
    rows = [*PROMPTS[:40], {"prompt": "a long one"}]
    made = trainer(tmp_path, lambda prompts, **_: [0.0] * len(prompts), rows)
    made.engine.microbatch_tokens = microbatch_tokens
    # The policy is elsewhere; the reference is not.
    for p in made.backbone.trainable():
        p.data.add_(0.1)
    everyone = made.train_prompts
    twice = everyone.take([0, 1, 0, *range(len(everyone))])
    states = made.engine.states(twice.batch())
    plain = tiny.model(**WEIGHTS).get_decoder()
    for row, ids in enumerate(twice.tokens):
        expected = plain(torch.tensor([ids])).last_hidden_state[0, -1]
        assert torch.allclose(states[row], expected, atol=1e-4)


def test_every_completion_has_a_mode_of_its_own(tmp_path):
    made = trainer(tmp_path, num_generations=4)
    sampled = made.sampler(made.train_prompts.take(range(8)), made.generator)
    modes = [row["mode"] for row in sampled.rollout.prompts.columns]
    texts = sampled.rollout.prompts.texts
    assert texts[0] == texts[3] != texts[4]
    assert any(len(set(modes[i : i + 4])) > 1 for i in range(0, 32, 4))


def test_without_learning_modes_stay_evenly_random(tmp_path):
    made = trainer(tmp_path, mode_learning_rate=0.0)
    made.train()
    assert not made.modes.policy.any() and not made.modes.value.any()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    changes = {"total_episodes": 128, "save_steps": 2, "eval_steps": 2, "mode_entropy_coef": 0.1}
    trainer(tmp_path, output_dir=str(tmp_path / "free"), **changes).train()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callbacks=[Stop(3)], **changes).train()
    again = trainer(tmp_path, **changes)
    assert again.train(resume_from_checkpoint=True).steps == 4
    ours, theirs = kept(tmp_path / "run"), kept(tmp_path / "free")
    assert ours == theirs
    assert any(path.name == "mode_policy.safetensors" for path in ours[0])
    assert again.modes.policy.any() and again.modes.value.any()


def test_a_signal_is_told_how_to_go_on_in_python(tmp_path):
    made = trainer(tmp_path)
    made.folder.make()
    made.keeper.checkpoints.save(1)
    assert "train(resume_from_checkpoint=" in made.keeper.checkpoints.told()


def test_its_run_is_exported_and_not_judged_without_modes(tmp_path, capsys):
    folder = str(tiny.folder(tmp_path / "model"))
    config = replace(FAST, model=folder, output_dir=str(tmp_path / "run"), total_episodes=32)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    HierarchicalTrainer(None, fitting_e, config, str(tmp_path / "data.jsonl")).train()
    given = json.loads((tmp_path / "run/given.json").read_text())
    assert given["train_dataset"] == str(tmp_path / "data.jsonl")
    export_run(tmp_path / "run", tmp_path / "plain")
    assert (tmp_path / "plain/model.safetensors").exists()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "picks a mode for every prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (PROMPTS, {"modes": {"red": "r", "long": "b" * 60}},
         r"in the mode 'long' the prompt '[a-h][i-l](xxxx|yyyy)' has 67 tokens, which with "
         r"response_length 6 exceeds the model's context of 64"),
        ([*PROMPTS, {"prompt": "ab", "mode": 1}], {}, "row 65 of the data has a column 'mode'"),
        (PROMPTS, {"modes": {}}, "modes is empty"),
        (PROMPTS, {"modes": ["concise", "terse"]}, "'terse' is no mode that ships"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tmp_path, rows, changes, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, rows=rows, **changes)


def test_another_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match="takes a HierarchicalConfig, not a PPOConfig"):
        HierarchicalTrainer("smollm2-135m", "sentiment", PPOConfig())
