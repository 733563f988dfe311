"""Agents learn from their own turns, each with its own baseline, and a run goes on where it was."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from signals import Signals, lines, numbers, same, trainer

from fastrlhf.experience import gather, score
from fastrlhf.losses import microbatch_loss
from fastrlhf.microbatches import cut


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_a_pair_learns_to_signal(tmp_path, algorithm):
    changes = dict(num_ppo_epochs=2, critic="shared") if algorithm == "ppo" else {}
    made = trainer(
        tmp_path, algorithm=algorithm, total_episodes=32 * 20, batch_size=32, pool_share=0.0,
        snapshot_steps=40, eval_prompts=64, lr_scheduler_type="linear", **changes,
    )  # fmt: skip
    summary = made.train()
    assert summary.before["game/success"] < 0.7
    assert summary.after["game/success"] > 0.9
    for line in lines(tmp_path):
        for agent in ("speaker", "listener"):
            assert line[f"{agent}/check/first_ratio"] == 1.0
            assert line[f"{agent}/turns"] == 32
    assert lines(tmp_path)[-1]["speaker/objective/kl"] > 0


def gradient_of(made, agent, whole_text=False):
    """The gradient of an agent's loss by the last states, [b, w, D], and the places of its tokens.

    whole_text: what would be wrong: the loss of all tokens, whoever said them.
    """
    played = made.players.play(made.game.deal(6, made.dealer, False), made.generator)
    turns, _ = played.turns_of(agent)
    backbone, config = made.backbone, made.configs[agent]
    with backbone.policy_is(agent):
        (layout,) = cut(turns.sequences, torch.arange(6), "sorted", 10**4)
        experience = score(backbone, turns, [layout], config)
        ones = torch.ones_like(experience.old_logprobs)
        batch = gather(backbone, experience.with_advantages(ones, ones), layout)
        if whole_text:
            index = torch.arange(layout.token_index.numel() - 1)
            batch = replace(
                batch, state_index=index, sequence_ids=index, ref_hidden=None,
                responses=turns.tokens.flatten()[layout.token_index.flatten()[1:]],
                response_mask=torch.ones_like(index, dtype=torch.bool),
                old_logprobs=torch.zeros(len(index)), advantages=torch.ones(len(index)),
            )  # fmt: skip
        spec = made.agents[agent].algorithm.spec(config, 1.0, made.agents[agent].state)
        spec = replace(spec, kl_coef=0.0)
        inputs = (batch.trunk, batch.attention_mask, batch.position_ids)
        hidden = backbone.hidden("policy", *inputs).detach().requires_grad_()
        backbone.hidden = lambda *given: hidden
        try:
            microbatch_loss(backbone, batch, spec, config, len(batch.responses)).loss.backward()
        finally:
            del backbone.hidden
    own = torch.zeros(layout.token_index.numel(), dtype=torch.bool)
    own[layout.state_index] = True
    return hidden.grad, own.view(layout.token_index.shape), layout, turns


@pytest.mark.parametrize("agent", ["speaker", "listener"])
def test_the_other_agents_tokens_get_no_gradient(tmp_path, agent):
    made = trainer(tmp_path, Signals(speaker_tokens=3))
    gradient, own, layout, turns = gradient_of(made, agent)
    assert (gradient[~own] == 0).all()
    assert (gradient[own] != 0).any(-1).all()
    # What predicts an own token is the prompt's last token, or an own one before it.
    prompt = turns.attention_mask.sum(1) - turns.response_mask.sum(1)
    assert int(own.sum()) == int(turns.response_mask.sum())
    for row, index in enumerate(layout.token_index[:, 0] // turns.tokens.shape[1]):
        assert own[row].nonzero()[0] == prompt[index] - 1
    # The test can fail: a loss that has no mask reaches what the other said.
    gradient, own, *_ = gradient_of(made, agent, whole_text=True)
    assert (gradient[~own] != 0).any()


def test_what_another_said_is_prompt(tmp_path):
    made = trainer(tmp_path)
    played = made.players.play(made.game.deal(6, made.dealer, False), made.generator)
    turns, rewards = played.turns_of("listener")
    for row, dialogue in enumerate(played.dialogues):
        assert turns.prompts.texts[row] == f"l {dialogue.turns[0].text or ' '}"
        assert turns.completions[row] == dialogue.turns[1].text
        assert rewards[row] == made.game.rewards(dialogue)[1]


def test_an_update_leaves_the_other_agents_as_they_are(tmp_path):
    made = trainer(tmp_path, learners=["listener"], pool_share=0.0)
    roles = ("speaker", "listener", "policy")
    before = {role: numbers(made.backbone, role) for role in roles}
    made.train()
    for role in roles:
        assert same(before[role], numbers(made.backbone, role)) == (role != "listener")
    assert "speaker/objective/kl" not in lines(tmp_path)[0]


def test_both_learn_and_neither_by_the_others_update(tmp_path):
    made = trainer(tmp_path)
    played = made.players.play(made.game.deal(16, made.dealer, False), made.generator)
    for agent, other in (("speaker", "listener"), ("listener", "speaker")):
        before = {role: numbers(made.backbone, role) for role in (agent, other)}
        # Some rewards differ, so that there is something to learn.
        turns, rewards = played.turns_of(agent)
        rewards = torch.arange(16.0).remainder(2)
        made.agents[agent].learn(1, turns, rewards)
        assert not same(before[agent], numbers(made.backbone, agent))
        assert same(before[other], numbers(made.backbone, other))
        assert made.backbone.trained_roles == ("speaker", "listener")


def test_each_agent_has_its_own_baseline(tmp_path):
    @dataclass(frozen=True)
    class Unequal(Signals):
        def rewards(self, dialogue):
            return [0.25, 0.75]

    made = trainer(tmp_path, Unequal(), kl_coef=0.0, total_episodes=32)
    made.train()
    first, second = lines(tmp_path)
    for agent, level in (("speaker", 0.25), ("listener", 0.75)):
        assert first[f"{agent}/baseline"] == 0
        assert second[f"{agent}/baseline"] == pytest.approx(level)
        assert second[f"{agent}/loss/policy"] == pytest.approx(0, abs=1e-6)


def test_turns_without_a_judgement_train_nothing(tmp_path):
    @dataclass(frozen=True)
    class Half(Signals):
        def rewards(self, dialogue):
            return [None, 1.0 if dialogue.start["target"] == "a" else None]

    made = trainer(tmp_path, Half(), total_episodes=16, pool_share=0.0)
    before = numbers(made.backbone, "speaker")
    made.train()
    (line,) = lines(tmp_path)
    assert same(before, numbers(made.backbone, "speaker"))
    assert line["listener/turns"] == 8 and "speaker/turns" not in line
    assert line["listener/reward"] == 1.0


def test_longer_dialogues_are_one_rollout_an_agent(tmp_path):
    @dataclass(frozen=True)
    class Chat(Signals):
        max_turns: int = 5

        def next_agent(self, dialogue):
            ends = 3 + (dialogue.start["target"] == "b")
            return self.agents[len(dialogue.turns) % 2] if len(dialogue.turns) < ends else None

        def prompt(self, dialogue, agent):
            return dialogue.start["target"] * (1 + len(dialogue.turns))

        def rewards(self, dialogue):
            return [0.1 * number for number, _ in enumerate(dialogue.turns)]

    made = trainer(tmp_path, Chat(), pool_share=0.0)
    played = made.players.play(made.game.deal(4, made.dealer, False), made.generator)
    assert [len(dialogue.turns) for dialogue in played.dialogues] == [3, 4, 3, 4]
    turns, rewards = played.turns_of("listener")
    # The second turn of all four, then the fourth of those with one.
    assert turns.prompts.texts == ["aa", "bb", "aa", "bb", "bbbb", "bbbb"]
    assert rewards.tolist() == pytest.approx([0.1] * 4 + [0.3] * 2)
    made.train()
    assert lines(tmp_path)[0]["listener/turns"] == 24


def test_the_runs_folder(tmp_path):
    made = trainer(tmp_path, matrix_games=4, eval_steps=2, save_steps=2)
    summary = made.train()
    run = tmp_path / "run"
    (matrix,) = json.loads((run / "win_rates.json").read_text())
    assert matrix["steps"] == [0, 2, 4] and len(matrix["rates"]) == 3
    assert all(0 <= rate <= 1 for row in matrix["rates"] for rate in row)
    assert (run / "win_rates.png").stat().st_size > 0
    assert [line["step"] for line in lines(tmp_path, "evaluations.jsonl")] == [0, 2, 4]
    sample = lines(tmp_path, "samples.jsonl")[0]
    assert [turn["agent"] for turn in sample["turns"]] == ["speaker", "listener"]
    assert len(sample["rewards"]) == 2
    for folder in ("checkpoints/final", "snapshots/step-000004"):
        for agent in ("speaker", "listener"):
            assert (run / folder / agent / "adapter_model.safetensors").is_file()
            assert (run / folder / agent / "adapter_config.json").is_file()
    assert json.loads((run / "summary.json").read_text())["after"] == summary.after
    shares = [line["listener/reward_against_past"] for line in lines(tmp_path)]
    assert len(shares) == 4


def test_the_round_that_ends_a_run_is_evaluated_once(tmp_path):
    made = trainer(tmp_path, eval_steps=2, kl_limit=1e-9)
    made.train()
    steps = [line["step"] for line in lines(tmp_path, "evaluations.jsonl")]
    assert steps == [0, 2] and len(lines(tmp_path)) == 2


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
    settings = dict(save_steps=2, total_episodes=16 * 6)
    whole = trainer(tmp_path / "a", **settings)
    whole.train()

    class Killed(Exception):
        pass

    def killed(number):
        if number == 5:
            raise Killed
        return played(number)

    broken = trainer(tmp_path / "b", **settings)
    played, broken.round = broken.round, killed
    with pytest.raises(Killed):
        broken.train()
    again = trainer(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=True)
    for agent in ("speaker", "listener"):
        assert same(numbers(whole.backbone, agent), numbers(again.backbone, agent))
    kept = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(path)]
        for path in (tmp_path / "a", tmp_path / "b")
    ]
    assert kept[0] == kept[1]
    assert again.pool.steps == [0, 2, 4, 6]
