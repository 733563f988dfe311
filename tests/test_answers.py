"""Rewards that can be checked: examples, seeds that never meet, and what is missing."""

import builtins
import doctest
import importlib.util
import json
from types import SimpleNamespace

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


def test_numbers_that_a_column_with_gaps_made_floats():
    found = exact_answer(
        completions=["42", "42.0", "43", "0.5", "7"], answer=[42.0, 42.0, 42.0, 0.5, float("nan")]
    )
    assert found == [1.0, 1.0, 0.0, 1.0, None]


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
    row = procedural_rows("chain_sum", 1)[0]
    for entry in ("no JSON", "{}", "3", json.dumps({"answer": "1", "metadata": None})):
        with pytest.raises(UserError, match="which is none of the task 'chain_sum'"):
            verified(completions=["a"], task=["chain_sum"], entry=[entry])
    with pytest.raises(UserError, match="which is none of the task 'gcd'"):
        verified(completions=["a"], task=["gcd"], entry=[row["entry"]])
    with pytest.raises(UserError, match=r"no verifier of 'chain_sums'.*not registered"):
        verified(completions=["a"], task=["chain_sums"], entry=[row["entry"]])


@pytest.mark.skipif(not HAS_GYM, reason=INSTALL)
@pytest.mark.parametrize("task", ["arc_agi", "rearc"])
def test_verifiers_that_compare_tuples(task):
    rows = procedural_rows(task, 2)
    columns = {name: [row[name] for row in rows] for name in ("task", "entry")}
    assert verified(completions=[row["answer"] for row in rows], **columns) == [1.0, 1.0]


@pytest.mark.skipif(not HAS_GYM, reason=INSTALL)
def test_a_completion_that_a_verifier_cannot_read():
    row = procedural_rows("prime_factorization", 1)[0]
    columns = {name: [row[name]] * 2 for name in ("task", "entry")}
    assert verified(completions=["It is what it is.", row["answer"]], **columns) == [0.0, 1.0]


@pytest.fixture
def fake_gym(monkeypatch):
    """A library of one task, whose verifier is given."""

    def use(verifier):
        library = SimpleNamespace(get_score_answer_fn=lambda task: verifier)
        monkeypatch.setattr(answers, "gym", lambda: library)

    return use


ENTRY = {"answer": "1", "metadata": {"grid": ((1, 2), [(3,)]), "plain": [{"a": 1}]}}


def test_an_entry_is_as_it_was_drawn(fake_gym):
    fake_gym(lambda answer, entry: float(answer == "1" and entry == ENTRY))
    as_json = json.dumps(answers.marked(ENTRY))
    assert verified(completions=["1", "2"], task=["t"] * 2, entry=[as_json] * 2) == [1.0, 0.0]
    answers.check_kept("t", ENTRY, as_json)
    with pytest.raises(UserError, match="own answer scores 1, and 0 once its entry was JSON"):
        answers.check_kept("t", ENTRY, json.dumps(ENTRY))


def test_what_a_verifier_raises(fake_gym):
    def verifier(answer, entry):
        if answer == "missing":
            raise ImportError("a package of the task")
        return int(answer)

    fake_gym(verifier)
    columns = {"task": ["t"] * 2, "entry": [ENTRY] * 2}
    assert verified(completions=["1", "It is what it is."], **columns) == [1.0, 0.0]
    with pytest.raises(ImportError, match="a package of the task"):
        verified(completions=["1", "missing"], **columns)


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
