"""Rewards that can be checked: answers, and procedural tasks with their own verifiers.

The data set's column `answer` holds the right one. `math_answer` needs math-verify, the tasks need
reasoning-gym: pip install 'fastrlhf[verify]'.

Item i of a data set of reasoning-gym is drawn with seed + i, so data sets of nearby seeds share
almost all items. `procedural_rows` takes seeds of training and held-out items from ranges that
never meet, and drops questions that come twice. Verifiers compare tuples, which JSON has not, so an
entry's tuples are marked in its JSON and are tuples again where it is judged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UserError, nearest
from .math_judge import MathJudge
from .registry import register

__all__ = ["exact_answer", "math_answer", "procedural_rows", "verified"]

INSTALL = "pip install 'fastrlhf[verify]'"
# Seeds of one data set are this far from those of the next.
SEED_SPACING = 10_000_000
ATTEMPTS = 20
# Of so many rows, the entry is judged as it was drawn and as it is read again.
CHECKED = 8
# The key that an entry's tuples have in JSON.
TUPLE = "__tuple__"
MATH = MathJudge()


def final_answer(text: str) -> str:
    """What a text gives as its answer: in the last box or tag, else all of it."""
    starts = [match.end() for match in re.finditer(r"\\boxed\{", text)]
    boxed = [x for start in reversed(starts) if (x := up_to_its_brace(text[start:])) is not None]
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (boxed[0] if boxed else tagged[-1] if tagged else text).strip()


def up_to_its_brace(text: str) -> str | None:
    """``text`` up to the brace that closes one before it; None where there is none."""
    depth = 1
    # Escaped braces are characters of the answer.
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[: match.start()]
    return None


@register("exact_answer", bounds=(0.0, 1.0))
def exact_answer(
    completions: Sequence[str], answer: Sequence[Any] = (), **_: object
) -> list[float | None]:
    r"""1 where the final answer is that of the row's column `answer`, but for case and spaces.

    The final answer is what stands in the last `\boxed{}` or `<answer></answer>`, else the whole
    completion; rows without an answer are not judged. A whole number that became a float, as a
    column with gaps makes it, may be written either way.

        >>> exact_answer(completions=[r"So \boxed{ 42 }", "41", "x"], answer=["42", 42, None])
        [1.0, 0.0, None]
    """
    check_answers(answer, completions, "exact_answer")

    def plain(text: object) -> str:
        return " ".join(str(text).split()).casefold()

    return [
        None if is_missing(right) else float(plain(final_answer(text)) in map(plain, ways(right)))
        for text, right in zip(completions, answer, strict=True)
    ]


def is_missing(answer: object) -> bool:
    """Whether a row has no answer: None, or NaN in a column of numbers."""
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def ways(answer: object) -> list[object]:
    """How an answer may be written: 42.0 as 42 too."""
    whole = isinstance(answer, float) and answer.is_integer()
    return [answer, int(answer)] if whole else [answer]  # type: ignore[call-overload]


@register("math_answer", bounds=(0.0, 1.0))
def math_answer(
    completions: Sequence[str], answer: Sequence[Any] = (), **_: object
) -> list[float | None]:
    r"""1 where the answer equals the row's column `answer` as mathematics (math-verify).

    `1/2`, `0.5` and `\frac{1}{2}` are equal. Rows without an answer are not judged; what takes
    math-verify longer than 5 seconds counts 0.

        >>> math_answer(completions=[r"\boxed{\frac{1}{2}}", "0.4"], answer=["1/2", "1/2"])
        [1.0, 0.0]
    """
    try:
        import math_verify  # noqa: F401  judges in a process of its own
    except ImportError as error:
        raise UserError(f"the reward 'math_answer' needs math-verify; run: {INSTALL}") from error
    check_answers(answer, completions, "math_answer")
    return [
        None if is_missing(truth) else float(MATH.equal(str(truth), text))
        for text, truth in zip(completions, answer, strict=True)
    ]


def check_answers(answer: Sequence[Any], completions: Sequence[str], name: str) -> None:
    if len(answer) != len(completions):
        raise UserError(
            f"the reward {name!r} needs the data set's column 'answer'; add it to every row"
        )


def gym():
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"procedural tasks need reasoning-gym; run: {INSTALL}") from error
    return reasoning_gym


def procedural_rows(
    task: str, size: int, *, seed: int = 0, held_out: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    """Distinct questions of a task of reasoning-gym, with what `verified` needs to judge them.

    Args:
        task: like "chain_sum".
        size: rows.
        seed: of the whole experiment; data sets of different seeds are drawn apart.
        held_out: draws from elsewhere than training does. Small tasks can still meet by chance:
            pass held-out rows as eval_dataset, whose prompts training leaves out.
        settings: of the task, like `max_terms=3`.

    Raises:
        UserError: no such task, settings that it does not take, too few questions, or entries that
            are judged otherwise once they were JSON.
    """
    library = gym()
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"no task {task!r} in reasoning-gym; {nearest(task, DATASETS)}")
    start = (2 * seed + held_out) * SEED_SPACING
    rows: dict[str, dict[str, Any]] = {}
    for attempt in range(ATTEMPTS):
        try:
            drawn = library.create_dataset(task, size=size, seed=start + attempt * size, **settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(
                f"the task {task!r} cannot be drawn with the settings {settings} ({error}); give "
                "it others"
            ) from error
        for entry in drawn:
            question, answer = entry["question"], entry["answer"]
            if question not in rows:
                as_json = json.dumps(marked(entry), default=str)
                if len(rows) < CHECKED:
                    check_kept(task, entry, as_json)
                rows[question] = dict(prompt=question, answer=answer, task=task, entry=as_json)
            if len(rows) == size:
                return list(rows.values())
    raise UserError(
        f"{task} gave {len(rows)} distinct questions, not {size}; lower size, or change its "
        "settings"
    )


def marked(value: Any) -> Any:
    """``value`` with its tuples as JSON can hold them."""
    if isinstance(value, dict):
        return {key: marked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [marked(inner) for inner in value]
        return {TUPLE: items} if isinstance(value, tuple) else items
    return value


def unmarked(found: dict[str, Any]) -> Any:
    """One object of JSON, a tuple where `marked` made it of one."""
    return tuple(found[TUPLE]) if found.keys() == {TUPLE} else found


def verifier_of(task: str) -> Callable[..., float]:
    try:
        return gym().get_score_answer_fn(task)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"reasoning-gym has no verifier of {task!r} by that name alone ({error}); choose "
            "another task"
        ) from error


def check_kept(task: str, entry: Mapping[str, Any], as_json: str) -> None:
    """Raise UserError where the task's own answer is worth something else after JSON."""
    verifier = verifier_of(task)
    read = read_entry(as_json, task)
    drawn, kept = (judged(verifier, entry["answer"], given) for given in (entry, read))
    if drawn != kept:
        raise UserError(
            f"the task {task!r} cannot be judged from rows: its own answer scores {drawn:g}, and "
            f"{kept:g} once its entry was JSON; choose another task"
        )


def read_entry(entry: str | Mapping[str, Any], task: str) -> Mapping[str, Any]:
    """An entry of the column `entry` as its task's verifier takes it."""
    try:
        found = json.loads(entry, object_hook=unmarked) if isinstance(entry, str) else entry
        fits = "answer" in found and found["metadata"].get("source_dataset", task) == task
    except (AttributeError, LookupError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(
            f"the column 'entry' has {str(entry)[:60]!r}, which is none of the task {task!r}; make "
            "the rows with fastrlhf.rewards.answers.procedural_rows"
        )
    return found


def judged(verifier: Callable[..., float], answer: str, entry: Mapping[str, Any]) -> float:
    """What a verifier gives, from 0 to 1; 0 for an answer that it cannot read."""
    try:
        score = float(verifier(answer=answer, entry=entry))
    except ImportError:
        raise
    except Exception:  # some take it for granted that an answer is a number, or a board of theirs
        return 0.0
    # Some give 0.01 for any answer at all.
    return score if score > 0.01 else 0.0


@register("verified", bounds=(0.0, 1.0))
def verified(
    completions: Sequence[str],
    task: Sequence[str] = (),
    entry: Sequence[str | Mapping[str, Any]] = (),
    **_: object,
) -> list[float]:
    """The verifier of each row's own procedural task, from 0 to 1; rows: `procedural_rows`.

    A completion that the verifier cannot read, and raises for, gets 0.

    >>> row = procedural_rows("chain_sum", 1)[0]
    >>> verified(completions=[row["answer"], "?"], task=[row["task"]] * 2,
    ...          entry=[row["entry"]] * 2)
    [1.0, 0.0]
    """
    if not len(task) == len(entry) == len(completions):
        raise UserError(
            "the reward 'verified' needs the columns 'task' and 'entry'; make the rows with "
            "fastrlhf.rewards.answers.procedural_rows"
        )
    verifiers = {name: verifier_of(name) for name in set(task)}
    return [
        judged(verifiers[name], final_answer(text), read_entry(row, name))
        for text, name, row in zip(completions, task, entry, strict=True)
    ]
