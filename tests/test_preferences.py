"""Preferences: what rows may say, and what is said of rows that say nothing."""

import json

import pytest
import tiny

from fastrlhf import preferences
from fastrlhf.comparisons import PairedTexts, RatedTexts
from fastrlhf.errors import UserError
from fastrlhf.preferences import load_preferences, rated_snippets, tokenize_preferences

GOOD = {"prompt": "a ", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"chosen": "same", "rejected": "same"}], "row 2: chosen and rejected are equal"),
        ([{"chosen": "a"}], "row 1: no 'rejected' \\(its columns: chosen\\)"),
        ([{"rating": 1}], "no 'completion'"),
        ([GOOD, {"completion": "a", "rating": 1}], "row 2: pairs and ratings are mixed"),
        ([{**GOOD, "margin": "big"}], "row 1: 'margin' must be a finite number, not 'big'"),
        ([{"completion": "a", "rating": float("nan")}], "'rating' must be a finite number"),
        ([{**GOOD, "chosen": " "}], "'chosen' must be text that is not empty"),
        ([{"completion": x, "rating": 2} for x in "ab"], "has one class"),
        (
            [{"prompt": x, "completion": "c", "rating": r} for x, r in (("a", 1), ("b", 2))],
            "no two completions of a prompt",
        ),
        ([], "is empty"),
        ([["chosen", "rejected"]], "must be an object"),
    ],
)
def test_rows_that_prefer_nothing_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        load_preferences(rows)


def test_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({"chosen": "x", "rejected": "x"}) + "\n")
    with pytest.raises(UserError, match=r"pairs.jsonl, line 2: chosen and rejected are equal"):
        load_preferences(str(path))
    with pytest.raises(UserError, match="give movie-pairs, or the path"):
        load_preferences(str(tmp_path / "none.jsonl"))


def test_a_text_in_several_pairs_is_one_text():
    rows = [GOOD, {"prompt": "a ", "chosen": "good", "rejected": "worse", "margin": 2}]
    found = tokenize_preferences(rows, tiny.tokenizer(), max_length=64)
    assert isinstance(found, PairedTexts)
    texts = [tiny.tokenizer().decode(ids) for ids in found.tokens]
    assert texts == ["a good", "a bad", "a worse"]
    assert found.chosen.tolist() == [0, 0] and found.rejected.tolist() == [1, 2]
    assert found.margin.tolist() == [0.0, 2.0]


def test_long_texts_are_left_out_and_said_to_be():
    rows = [GOOD, {"chosen": "x" * 30, "rejected": "y"}]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        found = tokenize_preferences(rows, tiny.tokenizer(), max_length=20)
    assert len(found) == 1 and len(found.tokens) == 2
    with pytest.raises(UserError, match="every text has more than max_length"):
        tokenize_preferences(rows[1:], tiny.tokenizer(), max_length=20)


def test_ratings_are_compared_within_a_prompt():
    rows = [
        {"prompt": p, "completion": c, "rating": r}
        for p, c, r in (("a ", "x", 1), ("a ", "y", 3), ("b ", "x", 2), ("b ", "z", 2.2))
    ]
    found = tokenize_preferences(load_preferences(rows), tiny.tokenizer(), max_length=9)
    assert isinstance(found, RatedTexts)
    (pairs,) = found.pairs()
    chosen, rejected = pairs.texts[pairs.chosen].tolist(), pairs.texts[pairs.rejected].tolist()
    assert sorted(zip(chosen, rejected, strict=True)) == [(1, 0), (3, 2)]


def test_messages_go_through_the_template():
    tokenizer = tiny.tokenizer()
    rows = [{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}]
    with pytest.raises(UserError, match=r"row 1 is chat messages, but .* no chat template"):
        tokenize_preferences(rows, tokenizer, max_length=64)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    found = tokenize_preferences(rows, tokenizer, max_length=64)
    assert tokenizer.decode(found.tokens[0]) == "a "
    with pytest.raises(UserError, match="must both be text, or both be messages"):
        tokenize_preferences([{"prompt": "p", **rows[0]}], tokenizer, max_length=64)


def test_movie_pairs_are_the_published_ratings(monkeypatch, tmp_path):
    import io
    import tarfile

    text = "1\t2.25\t Good film \n2\t-1.5\tBad film\n3\t0.5\tGood film\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        info = tarfile.TarInfo(preferences.SNIPPETS)
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text.encode()))
    path = tmp_path / "v.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("v/" + preferences.INNER_ARCHIVE)
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    assert rated_snippets(path) == [(2.25, "Good film"), (-1.5, "Bad film")]
