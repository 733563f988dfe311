"""Preferences: what rows may say, and what is said of rows that say nothing."""

import gzip
import json
from dataclasses import replace

import pytest
import tiny
from tokenizers import processors

from fastrlhf import RewardConfig, preferences
from fastrlhf.comparisons import PairedTexts, RatedTexts
from fastrlhf.data import PromptSet
from fastrlhf.errors import UserError
from fastrlhf.preferences import (
    load_preferences,
    rated_snippets,
    split_preferences,
    tokenize_preferences,
)
from fastrlhf.rewards.model import RewardModel

TEMPLATE = (
    "{{ eos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}x y {% endif %}"
)
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
        ([{"completion": "a", "rating": r} for r in (1, 2)], "no two completions of a prompt"),
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
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c d"}]
    rows = [{"chosen": said, "rejected": "b"}]
    with pytest.raises(UserError, match=r"row 1 is chat messages, but .* no chat template"):
        tokenize_preferences(rows, tokenizer, max_length=64)
    tokenizer.chat_template = TEMPLATE
    found = tokenize_preferences(rows, tokenizer, max_length=64)
    assert tokenizer.decode(found.tokens[0]) == "<end>a x y c d"
    refused = [rows[0], {"chosen": said, "rejected": [{**said[0], "role": "system"}, said[1]]}]
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"row 2: the model's chat template .*TemplateError: no"):
        tokenize_preferences(refused, tokenizer, max_length=64)
    with pytest.raises(UserError, match="must both be text, or both be messages"):
        tokenize_preferences([{"prompt": "p", **rows[0]}], tokenizer, max_length=64)
    with pytest.raises(UserError, match="chosen must end with a message of the assistant"):
        tokenize_preferences([{"chosen": said[:1], "rejected": "b"}], tokenizer, max_length=64)


def test_parts_of_text_in_messages():
    def said(content):
        return [{"role": "assistant", "content": content}]

    good = said([{"type": "text", "text": "go"}, {"type": "text", "text": "od"}])
    row = {**GOOD, "prompt": [{"role": "user", "content": good[0]["content"][:1]}], "chosen": good}
    (found,) = load_preferences([{**row, "rejected": said("bad")}])
    assert found["chosen"] == said("good") and found["prompt"][0]["content"] == "go"
    with pytest.raises(UserError, match="row 1: chosen and rejected are equal"):
        load_preferences([{**row, "rejected": said("good")}])
    message = "row 2, 'rejected', message 1: the content is None; write text"
    with pytest.raises(UserError, match=message):
        load_preferences([GOOD, {**row, "rejected": said(None)}])


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_what_is_trained_on_is_what_is_scored(start, monkeypatch):
    """The same tokens, with a tokenizer that begins every text with a token of its own."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    tokenizer.chat_template = start + TEMPLATE.replace("{{ eos_token }}", "")
    asked = [{"role": "user", "content": "a"}]
    row = {"prompt": asked}
    for name, text in (("chosen", "c d"), ("rejected", "e")):
        row[name] = [{"role": "assistant", "content": text}]
    trained = tokenize_preferences([row], tokenizer, max_length=64).tokens
    prompts = PromptSet.tokenize([row], tokenizer, context=64, response_length=8)
    scored = []
    monkeypatch.setattr("fastrlhf.rewards.model.TextStates", lambda b, ids, **_: scored.extend(ids))
    monkeypatch.setattr(RewardModel, "load", lambda self: None)
    with pytest.raises(AttributeError):
        RewardModel(tokenizer=tokenizer).scores([prompts.texts[0] + x for x in ("c d", "e")])
    assert scored == list(trained) and [ids.count(begin) for ids in scored] == [1, 1]


def test_files_of_other_kinds(tmp_path):
    array = tmp_path / "pairs.json"
    array.write_text(json.dumps([GOOD, GOOD], indent=1))
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert load_preferences(str(array)) == [GOOD, GOOD]
    assert load_preferences(str(packed)) == [GOOD]


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


def test_held_out_rows_are_not_trained_on():
    pair = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    other = {"prompt": "a ", "chosen": "d", "rejected": "e"}
    apart = preferences.without([pair, other], [{"prompt": "a ", "chosen": "x", "rejected": "c"}])
    assert apart == [other], "one text in common is one too many"
    rated = [{"prompt": x, "completion": "y", "rating": r} for x in "pq" for r in (1, 2)]
    apart = preferences.without(rated, [{"prompt": "p", "completion": "z", "rating": 1}])
    assert {row["prompt"] for row in apart} == {"q"}, "a prompt of ratings is on one side"
    tokenizer, config = tiny.tokenizer(), RewardConfig()
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        train, held_out = split_preferences([pair, other], [pair], tokenizer, config, 64)
    assert len(train) == len(held_out) == 1
    with pytest.raises(UserError, match="every row of the data is in eval_dataset"):
        split_preferences([pair], [pair], tokenizer, config, 64)
    close = [{"prompt": "p", "completion": x, "rating": r} for x, r in (("a", 0.1), ("b", 0.2))]
    with pytest.raises(UserError, match=r"more than rating_gap \(1\)"):
        split_preferences(close, None, tokenizer, replace(config, rating_gap=1.0), 64)


def test_rows_that_a_split_loses_are_counted():
    tokenizer, config = tiny.tokenizer(), RewardConfig(eval_rows=3)
    rows = [{"prompt": p, "chosen": c, "rejected": "z"} for p in "abcdef" for c in "xy"]
    train, held_out = split_preferences(rows, None, tokenizer, config, 64)
    assert len(train) == 10 and len(held_out) == 2
    config = replace(config, eval_rows=1)
    message = "1 of 12 rows share a text with the 1 that are held out.*lower eval_rows"
    with pytest.warns(UserWarning, match=message):
        train, held_out = split_preferences(rows, None, tokenizer, config, 64)
    assert len(train) == 10 and len(held_out) == 1
