"""The table of verbs: each row makes a parser, and asking for help costs no import of torch."""

import subprocess
import sys
from dataclasses import replace

import pytest

from fastrlhf.cli import main
from fastrlhf.config import PPOConfig
from fastrlhf.errors import SelfCheckError, UserError
from fastrlhf.verbs import VERBS, Option, Verb, option


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if verb.has_help])
def test_every_verb_has_help(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: fastrlhf {name}" in told
    for taken in VERBS[name].options:
        assert taken.name in told or taken.more["metavar"] in told


def test_the_verbs_are_listed_with_what_they_do(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, verb in VERBS.items():
        assert f" {name} {verb.help}" in told


def test_asking_for_help_is_quick():
    script = (
        "import sys\nfrom fastrlhf.cli import main\n"
        "try:\n    main(['ppo', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_a_row_lists_its_settings_in_place_of_an_epilog():
    row = Verb("try", "tries", lambda given: 0, lists=PPOConfig, epilog="unseen")
    assert "kl_coef = 0.05" in str(row.closing) and "unseen" not in str(row.closing)
    assert option("--far", "how far", type=int) == Option("--far", "how far", {"type": int})


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if verb.rest is None])
def test_verbs_without_settings_refuse_them(capsys, name):
    places = [x for x in VERBS[name].options if not x.name.startswith("--")]
    needed = ["--output", "made"] if name == "export" else []
    assert main([name, *("somewhere" for _ in places), *needed, "--kl-coef=1"]) == 2
    assert "'--kl-coef=1' is no option of this verb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "name", "status", "told"),
    [
        (UserError("what is wrong"), "plot", 2, "fastrlhf: error: what is wrong\n"),
        (SelfCheckError("what broke"), "plot", 1, "fastrlhf: error: what broke\n"),
        (SystemExit(143), "plot", 143, ""),
        (KeyboardInterrupt(), "plot", 130, "fastrlhf: interrupted\n"),
        (KeyboardInterrupt(), "ppo", 130, "interrupted; what was written is in the run's folder\n"),
        (KeyboardInterrupt(), "pareto", 130, "interrupted; the same command goes on with it\n"),
    ],
)
def test_how_a_verb_may_end(capsys, monkeypatch, raised, name, status, told):
    def runs(given):
        raise raised

    monkeypatch.setitem(VERBS, name, replace(VERBS[name], runs=runs))
    words = {"plot": ["run"], "pareto": ["--rewards", "a", "b"]}.get(name, [])
    assert main([name, *words]) == status
    assert capsys.readouterr().err.endswith(told)
