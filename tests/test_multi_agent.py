"""Agents learn from their own turns, each with its own baseline, and meet who they were."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import tiny
import torch

from fastrlhf import MultiAgentConfig, MultiAgentTrainer, SharedBackbone, UserError
from fastrlhf.backbone import LoraSettings
from fastrlhf.experience import gather, score
from fastrlhf.losses import microbatch_loss
from fastrlhf.microbatches import cut
from fastrlhf.multi_agent import Dialogue, ProposerSolver, ReferenceGame, Turn
from fastrlhf.multi_agent.matrix import win_rates

FAST = MultiAgentConfig(
    total_episodes=64, batch_size=16, learning_rate=1e-2, lr_scheduler_type="constant",
    train_layers=2, lora_rank=8, kl_coef=0.01, microbatch_tokens=10**4, eval_prompts=8,
    num_samples=0, save_steps=None, snapshot_steps=2, matrix_games=0,
)  # fmt: skip


@dataclass(frozen=True)
class Signals:
    """The speaker knows one of two letters; the listener is to answer with half of the alphabet."""

    name: str = "signals"
    agents: tuple = ("speaker", "listener")
    max_turns: int = 2
    bounds: tuple = (0.0, 1.0)
    stop: str | None = None
    speaker_tokens: int = 1

    @property
    def turn_tokens(self):
        return {"speaker": self.speaker_tokens, "listener": 1}

    def deal(self, count, generator, held_out):
        return [{"target": "ab"[i % 2]} for i in range(count)]

    def next_agent(self, dialogue):
        return self.agents[len(dialogue.turns)] if len(dialogue.turns) < 2 else None

    def prompt(self, dialogue, agent):
        if agent == "speaker":
            return f"s{dialogue.start['target']}"
        return f"l {dialogue.turns[0].text or ' '}"

    def found(self, dialogue):
        answer = dialogue.turns[1].text
        return bool(answer) and ((answer < "n") == (dialogue.start["target"] == "a"))

    def rewards(self, dialogue):
        return [float(self.found(dialogue))] * 2

    def won(self, dialogue, agent):
        return float(self.found(dialogue))

    def figures(self, dialogues):
        return {"success": sum(map(self.found, dialogues)) / len(dialogues)}


def trainer(tmp_path, game=None, **changes) -> MultiAgentTrainer:
    config = replace(FAST, output_dir=str(tmp_path / "run"), **changes)
    torch.manual_seed(config.seed)
    backbone = SharedBackbone(
        tiny.model(), lora=LoraSettings(8, 32.0), train_layers=2, critic=config.critic
    )
    return MultiAgentTrainer(backbone, game or Signals(), config, tiny.tokenizer())


def lines(tmp_path, name="metrics.jsonl"):
    return [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]


def numbers(backbone, agent):
    return [p.detach().clone() for p in backbone.role_parameters(agent)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


def pool(tmp_path, steps, **changes):
    made = trainer(tmp_path, **changes)
    for step in steps:
        for agent in made.game.agents:
            for p in made.backbone.role_parameters(agent):
                p.data.fill_(step / 100)
        made.pool.keep(step)
    return made


@pytest.mark.parametrize(
    "sampling, expected", [("uniform", [1 / 3] * 3), ("recent", [1 / 7, 2 / 7, 4 / 7])]
)
def test_past_selves_are_drawn_as_asked(tmp_path, sampling, expected):
    made = pool(tmp_path, [0, 2, 4, 6], pool_size=3, pool_sampling=sampling)
    assert made.pool.steps == [2, 4, 6]
    generator = torch.Generator().manual_seed(0)
    counts = Counter(made.pool.draw(generator) for _ in range(2000))
    for step, share in zip((2, 4, 6), expected, strict=True):
        assert counts[step] / 2000 == pytest.approx(share, abs=0.04)


def test_a_share_of_the_dialogues_is_against_past_selves(tmp_path):
    made = pool(tmp_path, [0, 2], pool_share=0.5)
    seats = made.pool.seats(16, ["speaker", "listener"], torch.Generator().manual_seed(0))
    assert seats[:8] == [{}] * 8
    assert [list(seat) for seat in seats[8:]] == [["listener"], ["speaker"]] * 4
    played = made.players.play(made.game.deal(16, made.dealer, False), made.generator, seats)
    # Eight dialogues among selves of now, and four in which the other is a past self.
    for agent in made.game.agents:
        turns, _ = played.turns_of(agent)
        assert len(turns.tokens) == 12
    past = {(s.agent, s.past) for s in played.spoken if s.past is not None}
    assert past == {("listener", seats[8]["listener"]), ("speaker", seats[9]["speaker"])}


def test_a_past_self_speaks_with_its_own_weights_and_leaves(tmp_path):
    made = pool(tmp_path, [0, 2])
    parameters = made.backbone.role_parameters("speaker")
    with made.pool.playing("speaker", 0):
        assert all((p == 0).all() for p in parameters)
    with pytest.raises(RuntimeError), made.pool.playing("speaker", 0):
        raise RuntimeError
    assert all((p == 0.02).all() for p in parameters)
    said = {}
    for step in (0, None):
        generator = torch.Generator().manual_seed(3)
        seats = [{} if step is None else {"speaker": step}] * 16
        starts = made.game.deal(16, made.dealer, False)
        said[step] = made.players.play(starts, generator, seats).dialogues
    with made.pool.playing("speaker", 0):
        generator = torch.Generator().manual_seed(3)
        again = made.players.play(starts, generator).dialogues
    assert again == said[0]


def test_the_matrix_is_that_of_who_plays(tmp_path):
    """What an agent says is told by its snapshot's number, so every cell is known."""

    @dataclass(frozen=True)
    class Higher(Signals):
        def won(self, dialogue, agent):
            if dialogue.turns[0].text == "none":
                return None
            own, other = (int(turn.text) for turn in dialogue.turns)
            return 0.5 if own == other else float((own > other) == (agent == "speaker"))

    made = pool(tmp_path, [0, 2, 4], game=Higher())
    speak = made.players.speak

    def numbered(agent, past, number, prompts, generator):
        rollout = speak(agent, past, number, prompts, generator)
        text = "none" if (agent, past) == ("speaker", 4) else str(past)
        return replace(rollout, completions=[text] * len(prompts))

    made.players.speak = numbered
    found = win_rates(made.players, "speaker", 3, seed=1)
    assert found.rates == [[0.5, 0.0, 0.0], [1.0, 0.5, 0.0], [None, None, None]]
    assert (found.agent, found.against, found.steps) == ("speaker", ["listener"], [0, 2, 4])
    assert found.mean(1) == 0.5
    found = win_rates(made.players, "listener", 3, seed=1)
    assert found.rates == [[0.5, 0.0, None], [1.0, 0.5, None], [1.0, 1.0, None]]


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


def bad(**parts):
    """The game with other parts."""
    return type("Bad", (Signals,), parts)()


@pytest.mark.parametrize(
    "game, words",
    [
        (bad(next_agent=lambda self, d: "judge"), ["turn 1", "'judge'", "speaker"]),
        (bad(next_agent=lambda self, d: "speaker"), ["does not end", "speaker", "turn 3"]),
        (bad(prompt=lambda self, d, agent: " "), ["turn 1", "speaker", "empty"]),
        (bad(prompt=lambda self, d, agent: "a" * 64), ["turn 1", "speaker", "context"]),
        (bad(rewards=lambda self, d: [0.0, 1.5]), ["listener", "turn 2", "1.5", "bounds"]),
        (bad(rewards=lambda self, d: [math.nan, 1.0]), ["speaker", "turn 1", "finite"]),
        (bad(rewards=lambda self, d: [1.0]), ["1 rewards", "2 turns"]),
        (bad(rewards=lambda self, d: ["good", 1.0]), ["speaker", "turn 1", "'good'"]),
    ],
)
def test_what_a_game_may_not_do_is_told_by_agent_and_turn(tmp_path, game, words):
    with pytest.raises(UserError) as caught:
        trainer(tmp_path, game).train()
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_cannot_begin_is_told_before(tmp_path):
    cases = [
        (dict(learners=["teacher"]), Signals(), "'teacher'"),
        ({}, replace(Signals(), agents=("speaker", "speaker")), "each once"),
        ({}, replace(Signals(), agents=("policy", "listener")), "'policy'"),
        ({}, replace(Signals(), stop="ab"), "2 tokens"),
        ({}, replace(Signals(), bounds=(1.0, 0.0)), "bounds"),
        ({}, replace(Signals(), max_turns=0), "max_turns"),
        ({}, object(), "lacks agents, bounds, deal"),
        (dict(pool_share=1.5), Signals(), "pool_share"),
        (dict(num_generations=2), Signals(), "num_generations"),
        (dict(learners=[]), Signals(), "learners"),
    ]
    for changes, game, word in cases:
        with pytest.raises(UserError, match=word):
            trainer(tmp_path, game, **changes)


def test_the_reference_game():
    game = ReferenceGame(["apple", "hammer", "queen", "cat", "lion", "bus"], held_out_share=0.5)
    generator = torch.Generator().manual_seed(0)
    for held_out, words in ((True, game.held_out), (False, game.trained)):
        for start in game.deal(20, generator, held_out):
            assert sorted(start["speaker"]) == sorted(start["listener"]) == sorted(words)
            assert start["target"] in words
    assert not set(game.held_out) & set(game.trained)
    shown = {
        "target": "apple",
        "speaker": ["apple", "cat", "bus"],
        "listener": ["cat", "bus", "apple"],
    }
    dialogue = Dialogue(shown)
    assert "apple, cat, bus" in game.prompt(dialogue, "speaker")
    assert "A apple is" in game.prompt(dialogue, "speaker")
    said = dialogue.then(Turn("speaker", " a red fruit"))
    seen = game.prompt(said, "listener")
    assert "cat, bus, apple" in seen and seen.endswith("; a red fruit =")
    for answer, rewards in (
        (" apple", [1, 1]), (" Apple.", [1, 1]), (" cat", [0, 0]), (" lion", [None, -1]),
        ("", [None, -1]),
    ):  # fmt: skip
        over = said.then(Turn("listener", answer))
        assert game.next_agent(over) is None and game.rewards(over) == rewards
        assert game.won(over, "speaker") == (rewards[1] == 1)
    for hint in (" apple", " an Apples", " applause", " pineapple"):
        named = dialogue.then(Turn("speaker", hint))
        assert game.next_agent(named) is None and game.rewards(named) == [-1.0]
    # A hint of nothing is a hint, and a bad one.
    assert game.next_agent(dialogue.then(Turn("speaker", ""))) == "listener"
    assert game.figures([over, named]) == {
        "success": 0.0, "named": 0.5, "chosen": 0.0, "distinct_hints": 1.0,
    }  # fmt: skip


def proposed(text, *answers, **start):
    dialogue = Dialogue({"examples": ["1+1"]} | start, (Turn("proposer", text),))
    for answer in answers:
        dialogue = dialogue.then(Turn("solver", answer))
    return dialogue


def test_the_proposer_is_paid_for_what_is_neither_easy_nor_hopeless():
    game = ProposerSolver(tries=4)
    right, wrong = "8", "9"
    earned = [game.rewards(proposed("5+3", *[right] * k, *[wrong] * (4 - k)))[0] for k in range(5)]
    assert earned == [0, 0.75, 1, 0.75, 0]
    assert game.rewards(proposed("5+3", right, wrong, wrong, wrong))[1:] == [1, 0, 0, 0]
    hard = ProposerSolver(tries=4, pays="hard")
    earned = [hard.rewards(proposed("5+3", *[right] * k, *[wrong] * (4 - k)))[0] for k in range(5)]
    assert earned == [1, 0.75, 0.5, 0.25, 0]
    assert game.won(proposed("5+3", right, wrong, wrong, wrong), "solver") == 0.25
    assert game.won(proposed("5+3", right, wrong, wrong, wrong), "proposer") == 0.75


def test_the_verifier():
    game = ProposerSolver(tries=2, largest=20)
    for text in ("5 + 3", "21+1", "0+4", "5-3", "", "5+3=8", "05+3", "a"):
        dialogue = proposed(text)
        assert game.next_agent(dialogue) is None and game.rewards(dialogue) == [-1]
        assert game.won(dialogue, "solver") == 1
    for text in ("5+3", " 5+3 ", "5+3\n7"):
        assert game.next_agent(proposed(text)) == "solver"
        assert game.prompt(proposed(text), "solver").endswith("\n5+3=")
    for answer, is_right in (
        ("8", True),
        (" 8", True),
        ("8\n", True),
        ("08", False),
        ("8.", False),
    ):
        assert game.right(proposed("5+3", answer)) == [is_right]
    assert game.next_agent(proposed("5+3", "1", "2")) is None


def test_held_out_sums_are_judged_only_where_that_is_asked():
    game = ProposerSolver(tries=2)
    held = next(f"{a}+3" for a in range(1, 20) if game.is_held_out((a, 3)))
    assert game.next_agent(proposed(held)) is None
    assert game.rewards(proposed(held)) == [None] and game.won(proposed(held), "solver") is None
    assert game.next_agent(proposed(held, held_out=True)) == "solver"
    exam = game.exam(10, seed=1)
    assert all(game.is_held_out(tuple(map(int, s["problem"].split("+")))) for s in exam)
    answered = Dialogue(exam[0], (Turn("solver", "1"), Turn("solver", "1")))
    assert game.next_agent(Dialogue(exam[0])) == "solver" and len(game.rewards(answered)) == 2
    generator = torch.Generator().manual_seed(0)
    for held_out in (True, False):
        for start in game.deal(20, generator, held_out):
            for example in start["examples"]:
                a, b = map(int, example.split("+"))
                assert game.is_held_out((a, b)) == game.is_held_out((b, a)) == held_out
