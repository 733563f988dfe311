"""Rewards that can be checked: examples, seeds that never meet, and what is missing."""

import builtins
import doctest
import importlib.util

import pytest

from fastrlhf.errors import UserError
from fastrlhf.rewards import answers
from fastrlhf.rewards.answers import (
    exact_answer,
    final_answer,
    math_answer,
    procedural_rows,
    verified,
)

HAS_MATH = importlib.util.find_spec("math_verify") is not None
HAS_GYM = importlib.util.find_spec("reasoning_gym") is not None
INSTALL = "pip install 'fastrlhf[verify]'"


def run_examples(function):
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(function, globs=vars(answers).copy()):
        runner.run(example)
    assert runner.tries and not runner.failures


def test_exact_answers():
    run_examples(exact_answer)
    assert exact_answer(completions=["<answer> New  York</answer>"], answer=["new york"]) == [1.0]
    with pytest.raises(UserError, match="needs the data set's column 'answer'"):
        exact_answer(completions=["a"])


def test_the_last_answer_counts():
    assert final_answer(r"\boxed{1} no, \boxed{2}") == "2"
    assert final_answer("just this ") == "just this"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}} no, \boxed{\frac{3}{x^{2}}}.", r"\frac{3}{x^{2}}"),
        (r"\boxed{1} then \boxed{\text{two}}", r"\text{two}"),
        (r"\boxed{\{1, 2}", r"\{1, 2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{4} and \boxed{cut \frac{1}", "4"),
        (r"<answer>5</answer> \boxed{cut", "5"),
    ],
)
def test_braces_within_an_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.skipif(not HAS_MATH, reason=INSTALL)
def test_equal_as_mathematics():
    run_examples(math_answer)
    found = math_answer(
        completions=["The answer is $x+1$", r"\boxed{1+x}", "0.5", "7", "7"],
        answer=["1+x", "x+1", r"\frac{1}{2}", 8, None],
    )
    assert found == [1.0, 1.0, 1.0, 0.0, None]


@pytest.mark.skipif(not HAS_MATH, reason=INSTALL)
def test_an_answer_without_end():
    found = math_answer(completions=[r"\boxed{9^{9^{9^{9}}}}", "0.5"], answer=["1/2", "1/2"])
    assert found == [0.0, 1.0]


@pytest.mark.skipif(not HAS_GYM, reason=INSTALL)
@pytest.mark.parametrize(
    ("task", "settings"),
    [("composite", {}), ("chain_sum", {"max_termz": 3}), ("chain_sum", {"max_terms": "a"})],
)
def test_settings_that_a_task_does_not_take(task, settings):
    with pytest.raises(UserError, match=f"the task '{task}' cannot be drawn with the settings"):
        procedural_rows(task, 2, **settings)


@pytest.mark.skipif(not HAS_GYM, reason=INSTALL)
def test_procedural_tasks():
    run_examples(verified)
    train = procedural_rows("chain_sum", 200, seed=1)
    questions = [row["prompt"] for row in train]
    assert len(set(questions)) == 200
    for other in (
        procedural_rows("chain_sum", 200, seed=2),
        procedural_rows("chain_sum", 200, seed=1, held_out=True),
    ):
        assert len({row["prompt"] for row in other} & set(questions)) < 5
    assert procedural_rows("chain_sum", 200, seed=1) == train
    columns = {name: [row[name] for row in train] for name in ("task", "entry")}
    assert set(verified(completions=[row["answer"] for row in train], **columns)) == {1.0}
    assert set(verified(completions=["nothing"] * 200, **columns)) == {0.0}
    with pytest.raises(UserError, match=r"no task 'chain_sums'.*'chain_sum'"):
        procedural_rows("chain_sums", 2)
    with pytest.raises(UserError, match="distinct questions, not 500"):
        procedural_rows("chain_sum", 500, min_terms=2, max_terms=2, min_digits=1, max_digits=1)


@pytest.mark.skipif(not HAS_GYM, reason=INSTALL)
def test_rows_without_a_verifier():
    with pytest.raises(UserError, match="needs the columns 'task' and 'entry'"):
        verified(completions=["a"])


def test_what_is_not_installed_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name.partition(".")[0] in ("math_verify", "reasoning_gym"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"math-verify; run: pip install 'fastrlhf\[verify\]'"):
        math_answer(completions=["a"], answer=["a"])
    with pytest.raises(UserError, match="reasoning-gym; run"):
        procedural_rows("chain_sum", 1)
