"""Past selves are kept, drawn, seated and given back; the matrix is that of who plays."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from signals import Signals, trainer

from fastrlhf import UserError
from fastrlhf.multi_agent.matrix import win_rates


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

    def numbered(agent, past, number, prompts, generator, setting):
        rollout = speak(agent, past, number, prompts, generator, setting)
        text = "none" if (agent, past) == ("speaker", 4) else str(past)
        return replace(rollout, completions=[text] * len(prompts))

    made.players.speak = numbered
    found = win_rates(made.players, "speaker", 3, seed=1)
    assert found.rates == [[0.5, 0.0, 0.0], [1.0, 0.5, 0.0], [None, None, None]]
    assert (found.agent, found.against, found.steps) == ("speaker", ["listener"], [0, 2, 4])
    assert found.mean(1) == 0.5
    found = win_rates(made.players, "listener", 3, seed=1)
    assert found.rates == [[0.5, 0.0, None], [1.0, 0.5, None], [1.0, 1.0, None]]


def test_a_matrix_that_nobody_waits_for_is_not_played_to_its_end(tmp_path):
    made = pool(tmp_path, [0, 2, 4])
    rows = iter((True, False))
    assert win_rates(made.players, "speaker", 3, seed=1, wanted=lambda: next(rows)) is None
    assert next(rows, "asked twice") == "asked twice"


def test_a_past_self_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    made = pool(tmp_path, [0])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made.backbone.adapters, "save", full)
    with pytest.raises(UserError, match=r"step-000002.* cannot be written .*No space left"):
        made.pool.keep(2)


def test_past_selves_on_disk_are_those_that_were_kept(tmp_path):
    made = pool(tmp_path, [0, 2])
    state, kept = made.pool.state_dict(), made.pool.kept
    made.pool.load_state_dict(state)
    for step, agents in kept.items():
        for agent, numbers in agents.items():
            for x, y in zip(made.pool.kept[step][agent], numbers, strict=True):
                assert torch.equal(x, y)
    path = made.pool.path(2) / "listener" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="its checksum is not that of what was written"):
        made.pool.load_state_dict(state)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="a past self, cannot be read"):
        made.pool.load_state_dict(state)
    path.unlink()
    with pytest.raises(UserError, match="a past self, is missing"):
        made.pool.load_state_dict(state)
