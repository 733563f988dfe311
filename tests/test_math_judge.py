"""The judge of mathematics: what never ends, dies or fails is no right answer, and no more."""

import threading
import time

import pytest

from fastrlhf.errors import UserError
from fastrlhf.rewards import math_judge
from fastrlhf.rewards.math_judge import MathJudge

FAKE = """
import os, time

def parse(text, parsing_timeout):
    print("whatever a library prints is no answer")
    if "sleep" in text:
        time.sleep(60)
    if "die" in text:
        os._exit(1)
    if "fail" in text:
        raise ValueError(text)
    return text.strip("$")

def verify(gold, given, timeout_seconds):
    return gold == given
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """One whose math-verify is made up."""
    (tmp_path / "math_verify.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = MathJudge()
    yield judge
    judge.end()


def test_questions_are_answered_in_one_process(judge):
    assert judge.equal("1", "1") and not judge.equal("1", "2\n3")
    first = judge.process
    assert judge.equal("4", "4") and judge.process is first


@pytest.mark.parametrize("text", ["sleep", "die", "fail"])
def test_what_is_late_or_fails_is_not_equal(judge, monkeypatch, text):
    assert judge.equal("1", "1")
    begin = time.perf_counter()
    with monkeypatch.context() as patch:
        patch.setattr(math_judge, "SECONDS", 0.5)
        assert not judge.equal("1", text)
    assert time.perf_counter() - begin < 20
    assert judge.equal("1", "1")


def test_in_another_thread(judge):
    found = []
    thread = threading.Thread(target=lambda: found.append(judge.equal("1", "1")))
    thread.start()
    thread.join(60)
    assert found == [True]


def test_an_interrupted_question_is_not_the_next_ones_answer(judge, monkeypatch):
    assert judge.equal("1", "1")

    def interrupted(call, timeout):
        call()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(math_judge, "in_thread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judge.equal("1", "1")
    assert judge.process is None


def test_a_library_that_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="math-verify does not start"):
        MathJudge().equal("1", "1")
