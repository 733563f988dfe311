"""What a game may not do is told by agent and turn; the shipped games keep their rules."""

import math
from dataclasses import replace

import pytest
import torch
from signals import Signals, trainer

from fastrlhf import MultiAgentConfig, UserError
from fastrlhf.multi_agent import Dialogue, ProposerSolver, ReferenceGame, Turn


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


def test_settings_that_leave_no_sum_are_refused():
    for changes in (dict(one_in=1000), dict(largest=1), dict(largest=1, one_in=2)):
        with pytest.raises(UserError, match=r"leaves none to .*raise largest or change one_in"):
            ProposerSolver(**changes)


def test_another_games_run_is_not_gone_on_with(tmp_path):
    changes = dict(total_episodes=32, save_steps=1)
    trainer(tmp_path, Signals(), **changes).train()
    with pytest.raises(UserError, match="a game with other rules"):
        trainer(tmp_path, Signals(bounds=(0.0, 2.0)), **changes).train(resume_from_checkpoint=True)


def test_what_agents_do_not_read_is_refused():
    for changes in (dict(hacking="stop"), dict(gold="sentiment")):
        with pytest.raises(UserError, match="paid by their game"):
            MultiAgentConfig(**changes)
    with pytest.raises(UserError, match="reward_clip shapes"):
        MultiAgentConfig(reward_clip=1.0)
