"""Rewards that can be checked: answers, and procedural tasks with their own verifiers.

The data set's column `answer` holds the right one. `math_answer` needs math-verify, the tasks need
reasoning-gym: pip install 'fastrlhf[verify]'.

Item i of a data set of reasoning-gym is drawn with seed + i, so data sets of nearby seeds share
almost all items. `procedural_rows` takes seeds of training and held-out items from ranges that
never meet, and drops questions that come twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, nearest
from .math_judge import MathJudge
from .registry import register

__all__ = ["exact_answer", "math_answer", "procedural_rows", "verified"]

INSTALL = "pip install 'fastrlhf[verify]'"
# Seeds of one data set are this far from those of the next.
SEED_SPACING = 10_000_000
ATTEMPTS = 20
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
    completion; rows without an answer are not judged.

        >>> exact_answer(completions=[r"So \boxed{ 42 }", "41", "x"], answer=["42", 42, None])
        [1.0, 0.0, None]
    """
    check_answers(answer, completions, "exact_answer")

    def plain(text: object) -> str:
        return " ".join(str(text).split()).casefold()

    return [
        None if right is None else float(plain(final_answer(text)) == plain(right))
        for text, right in zip(completions, answer, strict=True)
    ]


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
        None if truth is None else float(MATH.equal(str(truth), text))
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
        UserError: no such task, settings that it does not take, or too few questions.
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
            rows.setdefault(
                entry["question"],
                {
                    "prompt": entry["question"],
                    "answer": entry["answer"],
                    "task": task,
                    "entry": json.dumps(entry, default=str),
                },
            )
            if len(rows) == size:
                return list(rows.values())
    raise UserError(
        f"{task} gave {len(rows)} distinct questions, not {size}; lower size, or change its "
        "settings"
    )


@register("verified", bounds=(0.0, 1.0))
def verified(
    completions: Sequence[str],
    task: Sequence[str] = (),
    entry: Sequence[str | Mapping[str, Any]] = (),
    **_: object,
) -> list[float]:
    """The verifier of each row's own procedural task, from 0 to 1; rows: `procedural_rows`.

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
    library = gym()
    scores = []
    for text, name, row in zip(completions, task, entry, strict=True):
        given = json.loads(row) if isinstance(row, str) else row
        score = float(library.get_score_answer_fn(name)(answer=final_answer(text), entry=given))
        # Some verifiers give 0.01 for any answer at all.
        scores.append(score if score > 0.01 else 0.0)
    return scores
