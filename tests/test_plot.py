"""The picture of runs: what is drawn, on which panel, and what is refused."""

import pytest
from run_folders import make_run

from fastrlhf import plot
from fastrlhf.cli import main
from fastrlhf.errors import UserError
from fastrlhf.run_files import read_run

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    saved = []
    save = figures.Figure.savefig

    def savefig(figure, *args, **options):
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(figures.Figure, "savefig", savefig)
    return saved


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.axison]


def curves(figure, title):
    """The points of every curve of a panel."""
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return [line.get_xydata().tolist() for line in axes.get_lines()]


def test_a_run_with_its_evaluations(tmp_path, drawn):
    path = plot.save_plot([make_run(tmp_path / "a", 2)], tmp_path / "a.png", "one run")
    assert path.read_bytes().startswith(b"\x89PNG")
    rollouts, held_out = curves(drawn[0], "Reward")
    assert rollouts == [[4, 0.1], [8, 0.2]] and held_out == [[0, 0], [8, 0.2]]
    assert len(curves(drawn[0], "Clipped by PPO")) == 1
    assert titles(drawn[0])[-1] == "Time of a step"


def test_runs_are_compared_by_name(tmp_path, drawn):
    folders = [make_run(tmp_path / "a", 2), make_run(tmp_path / "b", 5, kl=False)]
    plot.save_plot(folders, tmp_path / "both.png")
    assert len(curves(drawn[0], "Reward")) == 4
    assert len(curves(drawn[0], "KL to the reference (exact)")) == 2
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    # Seconds of a step: both runs spent as long on each.
    (bars,) = [axes for axes in drawn[0].axes if axes.get_title(loc="left") == "Time of a step"]
    assert [p.get_width() for p in bars.patches] == [1, 1, 0.5, 0.5, 2, 2]


def test_what_no_run_measured_has_no_panel(tmp_path, drawn):
    plot.save_plot([make_run(tmp_path / "a", 2, kl=False)], tmp_path / "a.png")
    assert "KL to the reference (exact)" not in titles(drawn[0])


def test_every_objective_has_a_panel(tmp_path, drawn):
    """Behind the reward's, whichever of the runs has it."""
    several = make_run(tmp_path / "b", 3, **{"reward/sentiment": 0.5, "reward/short": 0.25})
    plot.save_plot([make_run(tmp_path / "a", 2), several], tmp_path / "both.png")
    own = ["Objective: sentiment", "Objective: short"]
    assert titles(drawn[0])[:3] == ["Reward", *own]
    assert curves(drawn[0], own[1]) == [[[4, 0.25], [8, 0.25], [12, 0.25]]]


def test_names_that_are_the_same_become_paths(tmp_path):
    runs = [read_run(make_run(tmp_path / x / "ppo", 1)) for x in "ab"]
    assert plot.unique_names(runs) == [str(tmp_path / "a/ppo"), str(tmp_path / "b/ppo")]


def test_the_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", 2)
    make_run(tmp_path / "b", 1)
    assert main(["plot", "a"]) == 0 and (tmp_path / "a/plot.png").exists()
    assert main(["plot", "a", "b"]) == 0
    assert capsys.readouterr().out.split() == ["a/plot.png", "comparison.png"]
    assert main(["plot", "a", "--output", "x.svg"]) == 0 and (tmp_path / "x.svg").exists()
    capsys.readouterr()
    # Its name is the one that is printed.
    assert main(["plot", "a", "--output", "pic"]) == 0
    assert capsys.readouterr().out.strip() == "pic.png" and (tmp_path / "pic.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "no run none"),
        (["a", "--output", "no/such.png"], "no/such.png cannot be written"),
        (["a", "--output", "x.mov"], "x.mov cannot be written"),
        (["a", "--outptu=x.png"], "'--outptu=x.png' is no option"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", 1)
    assert main(["plot", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "can_plot", lambda: False)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.save_plot([tmp_path], tmp_path / "a.png")
