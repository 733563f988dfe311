"""Rows out of files of every kind, and what is said of files that are none."""

import gzip
import json
import sys

import pytest

from fastrlhf.data import load_rows
from fastrlhf.dataset_files import read_rows
from fastrlhf.errors import UserError

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": [{"role": "user", "content": "b"}], "answer": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", LINES),
        ("p.json", LINES),
        ("p.json", ARRAY),
        ("p.jsonl.gz", gzip.compress(LINES)),
        ("p.json.gz", gzip.compress(ARRAY)),
    ],
)
def test_json(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_rows(str(tmp_path / name)) == ROWS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": [{"role": "user", "content": x}], "answer": i} for i, x in enumerate("ab")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert load_rows(str(tmp_path / "p.parquet")) == rows
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "q.parquet")
    with pytest.raises(UserError, match=r"row 1: no 'prompt' \(its columns: text\)"):
        load_rows(str(tmp_path / "q.parquet"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(read_rows(tmp_path / "p.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"prompt\na\n", "save it as .jsonl"),
        ("p.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("p.jsonl.gz", gzip.compress(LINES)[:-9], "not a whole gzip file"),
        ("p.json", ARRAY[:-1], "not JSON"),
        ("p.jsonl", b'[{"prompt": "a"}]\n', "line 1: must be an object"),
        ("p.parquet", b"PAR1 half", "not a whole Parquet file"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    if name == "p.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_rows(str(tmp_path / name))
    assert message in str(error.value) and name in str(error.value)


def test_names_of_a_hub_say_what_to_do():
    with pytest.raises(UserError, match=r"to_parquet\('prompts.parquet'\)"):
        load_rows("nobody/nothing")
    with pytest.raises(UserError, match="give movie-reviews, openings, or the path of a file"):
        load_rows("nothing")
