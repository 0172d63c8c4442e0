"""CSV and JSON files, read as they are written: no type is guessed, and what is malformed is refused by its line.

`datasets` and pandas guess: a column of ISO dates becomes timestamps, a first field too many becomes an index, and a
row that is too short is filled up. So files of text are read here, with the parsers of the standard library.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from ..core.errors import StreamError
from .hashing import file_digest
from .origin import Origin

_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class Malformed(ValueError):
    """What is wrong with a file, and in which line."""


def read_texts(paths: Sequence[Path], place: str) -> tuple[Dataset, Origin]:
    """The rows of the files of one split, all CSV or all JSON, held in memory.

    Args:
        place: "the train split of task `x`", for messages.

    Raises:
        StreamError: a file is malformed; names the file and the line.
    """
    columns, files = _Columns(), []
    read = _read_csv if paths[0].suffix.lower() == ".csv" else _read_json
    for path in paths:
        before = len(columns.lines)
        try:
            read(decoded(path), columns)
        except Malformed as error:
            raise StreamError(f"cannot read {place}, {path} is truncated or malformed: {error}") from error
        files.append((path, np.array(columns.lines[before:], dtype=np.int64)))
    table, strays = columns.finish()
    origin = Origin(place, tuple(files), untyped=read is _read_csv, strays=strays)
    # without a stamp `datasets` would pickle the whole table to make one
    return Dataset(InMemoryTable(table), fingerprint=file_digest(paths)[:16]), origin


def decoded(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        Malformed: it is in another encoding, or no text.
    """
    data = path.read_bytes()
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise Malformed(f"it is written in {encoding}: save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise Malformed(
            f"line {line} has a byte that is not UTF-8 (0x{data[error.start]:02x}, byte {column} of the line): save it "
            "as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise Malformed(f"line {line} has a null character: it is written in UTF-16, or no text; save it as UTF-8")
    return text


# ---- CSV ----


def _read_csv(text: str, columns: _Columns) -> None:
    """Every cell is text as written ("007", "None", "NA" included), an empty one is null.

    Raises:
        Malformed: a row with more or fewer fields than the header, a quote that is not closed, a column twice or
            without a name, another separator, another header than that of the files before.
    """
    records = _records(text)
    _, header = next(records, (1, []))
    names = [name.strip() for name in header]
    _check_header(names)
    if columns.lines and {*names} != {*columns.values}:
        raise Malformed(f"its header ({', '.join(names)}) is not that of the other files ({', '.join(columns.values)})")
    cells = [columns.values.setdefault(name, []) for name in names]
    for line, fields in records:
        if len(fields) != len(names):
            raise Malformed(_miscounted(line, fields, names))
        if "" in names[1:] and fields[names.index("", 1)]:  # the first is the index that pandas writes
            raise Malformed(
                f"line {line} has `{fields[names.index('', 1)][:40]}` in a column without a name: name it in the "
                "header, or quote texts that hold a comma"
            )
        for column, field in zip(cells, fields, strict=True):
            column.append(field or None)
        columns.lines.append(line)


def _records(text: str) -> Iterator[tuple[int, list[str]]]:
    """(the line on which it begins, the fields) of each record; blank lines are passed over."""
    longest = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of the process: a text may be longer than 128 KB
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        line = 1
        try:
            for fields in reader:
                if any(field.strip() for field in fields) or len(fields) > 1:
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise Malformed(
                f"the row that begins in line {line} has a quote out of place ({error}): write texts with quotes as "
                '"a ""quoted"" word"'
            ) from error
    finally:
        csv.field_size_limit(longest)


def _check_header(names: list[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1 and name]
    if twice:
        raise Malformed(f"its header names the column `{twice[0]}` twice")
    if len(names) == 1:
        for mark, called in _SEPARATORS.items():
            if mark in names[0]:
                raise Malformed(f"its header has no comma but {called}: save it with commas between the fields")


def _miscounted(line: int, fields: list[str], names: list[str]) -> str:
    header = (
        f"line {line} has {len(fields)} field{'s' * (len(fields) != 1)}, the header {len(names)} ({', '.join(names)})"
    )
    if len(fields) < len(names):
        return f"{header}: fill the missing ones"
    if not any(field.strip() for field in fields[len(names) :]):
        return f"{header}: remove the comma at its end"
    return f'{header}: quote texts that hold a comma, "like, this"'


# ---- JSON ----


def _read_json(text: str, columns: _Columns) -> None:
    """One object a line, or one list of objects. Strings stay strings, whatever they look like.

    Raises:
        Malformed: a line is no JSON object, or names a key twice.
    """
    if text.lstrip()[:1] == "[":
        for number, row in enumerate(_load(text, _from_start)):
            columns.add(row, number, f"item {number} of its list")
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                columns.add(_load(line, _in_line(number)), number, f"line {number}")


def _in_line(number: int) -> Callable[[json.JSONDecodeError | None], str]:
    return lambda error: f"line {number}" + (f", column {error.colno}" if error is not None else "")


def _from_start(error: json.JSONDecodeError | None) -> str:
    return "its list" if error is None else f"line {error.lineno}, column {error.colno}"


def _load(text: str, where: Callable[[json.JSONDecodeError | None], str]) -> Any:
    try:
        found = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        return found
    except UnicodeEncodeError as error:
        raise Malformed(f"{where(None)} has half a character, \\u{ord(error.object[error.start]):04x}") from error
    except json.JSONDecodeError as error:
        raise Malformed(f"{where(error)} is no JSON: {error.msg} (one object a line is expected)") from error
    except (_Twice, RecursionError, ValueError) as error:  # ValueError: a number of more than 4300 digits
        raise Malformed(f"{where(None)} {error}") from error


class _Twice(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Twice(f"has the key `{name}` twice")
    return found


class _Columns:
    """Rows on their way into columns; a key that a row lacks is null there.

    Attributes:
        values: column -> the values so far.
        lines: the line on which each row begins.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}
        self.lines: list[int] = []

    def add(self, row: Any, line: int, where: str) -> None:
        if not isinstance(row, dict):
            raise Malformed(f'{where} is no object with columns, {{"text": "a text", "label": "a label"}}')
        for name, value in row.items():
            values = self.values.setdefault(name, [])
            values.extend([None] * (len(self.lines) - len(values)))
            values.append(value)
        self.lines.append(line)

    def finish(self) -> tuple[pa.Table, dict[str, int]]:
        """(the columns, `Origin.strays`)."""
        found, strays = {}, {}
        for name, values in self.values.items():
            values.extend([None] * (len(self.lines) - len(values)))
            found[name], mixed = _column(values)
            if mixed:
                strays[name] = next(i for i, value in enumerate(values) if not isinstance(value, (str, NoneType)))
        found.pop("", None)  # the index that pandas writes
        return pa.table(found), strays


def _column(values: list[Any]) -> tuple[pa.Array, bool]:
    """(the values as one column, whether they are of several types). Those of several types become text: an array has
    one."""
    kinds = {type(value) for value in values} - {NoneType}
    try:
        if kinds <= {str}:
            return pa.array(values, pa.string()), False
        if len(kinds) == 1:
            return pa.array(values), False
        if kinds == {int, float} and all(abs(v) < 2**53 for v in values if type(v) is int):
            return pa.array([None if v is None else float(v) for v in values], pa.float64()), False
    except (pa.ArrowException, OverflowError):  # lists of several types, or very large numbers
        pass
    return pa.array([v if isinstance(v, (str, NoneType)) else _written(v) for v in values], pa.string()), True


def _written(value: Any) -> str | None:
    if isinstance(value, float):
        return None if value != value else str(int(value)) if value.is_integer() else str(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
