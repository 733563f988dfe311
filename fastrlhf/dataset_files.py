"""Rows out of files: JSON Lines, a JSON array, Parquet, the first two also gzipped.

The kind is told by the name's end; a `.json` file may hold either. Rows come as the file has them:
what is in them is for the caller to check.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

__all__ = ["no_such_file", "read_json_lines", "read_rows"]

KINDS = ".jsonl, .json, .jsonl.gz, .json.gz or .parquet"


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of the file ``path``.

    Raises:
        UserError: a file of another kind or one that is broken, with the line where there is one.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        return read_parquet(path)
    if kind in ("json", "jsonl", "ndjson"):
        return read_json_lines(path)
    raise UserError(f"{path} is none of the kinds that are read; save it as {KINDS}")


def no_such_file(name: str, known: str) -> UserError:
    """What to do about a data set ``name`` that is no file; ``known`` says which names there are.

    Data sets of a hub are not fetched: which column is the prompt is for their reader to say.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(("json", "jsonl", "parquet")):
        return UserError(
            f"no data set {name!r}: if it is one of the Hugging Face hub, write it to a file, "
            f"load_dataset({name!r}, split='train').to_parquet('prompts.parquet'), and give that"
        )
    return UserError(f"no data set {name!r}: give {known}, or the path of a file ({KINDS})")


def read_json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The values on the lines of a file, or of the one array that it holds."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "a whole gzip file"
        raise UserError(f"{path} is not {kind}; save it as UTF-8 JSON Lines") from error
    if text.lstrip().startswith("[") and path.name.removesuffix(".gz").endswith(".json"):
        yield from parsed(text, str(path))
        return
    lines = text.split("\n")
    if lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield parsed(line, f"{path}, line {number}")


def parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f'{where}: not JSON ({error.msg}); each line must be like {{"prompt": "The film"}}'
        ) from error


def read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow; run: pip install pyarrow") from error
    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a whole Parquet file ({reason}); write it again") from error
