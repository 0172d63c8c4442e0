"""New inputs as they lie in a file, and what was predicted or generated written beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from PIL import Image

from ..core.errors import StreamError, nearest
from ..core.files import write_text
from .columns import USUAL
from .formats import read_files
from .pictures import eight_bits

WRITTEN = (".csv", ".jsonl", ".parquet")


def read_inputs(path: Path, columns: Sequence[str], names: Mapping[str, str] | None = None) -> datasets.Dataset:
    """The rows of a file, those columns that are inputs under our names.

    Args:
        path: CSV, JSON (lines) or Parquet; or .txt with an input in every line.
        columns: the input columns of the stream that was learned.
        names: the file's name -> ours, {"sentence": "text"}.

    Raises:
        StreamError: it cannot be read, lacks an input column, or has a row without a value there.
    """
    place = f"the input `{path}`"
    if not path.is_file():
        raise StreamError(f"there is no file `{path}`: give --input a CSV, JSON, JSON lines, Parquet or text file")
    if path.suffix.lower() == ".txt":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = datasets.Dataset.from_dict({columns[0]: lines})
    else:
        rows = read_files([path], place)
    for old, new in (names or {}).items():
        if old not in rows.column_names:
            raise StreamError(f"{place} has no column `{old}`: {nearest(old, rows.column_names)}")
        if new in rows.column_names:
            rows = rows.remove_columns(new)
        rows = rows.rename_column(old, new)
    optional = columns[1:] if columns[:1] == ("text",) else ()
    for column in columns:
        if column not in rows.column_names:
            if column in optional:
                continue
            usual = [name for name in rows.column_names if name in USUAL.get(column, "").split()]
            raise StreamError(
                f"{place} has no column `{column}`, only {', '.join(rows.column_names)}: say which it is, "
                f"--columns {(usual or rows.column_names)[0]}={column}"
            )
        for number, value in enumerate(rows[column][:]):
            if value is None:
                raise StreamError(f"{place}, row {number}: `{column}` is empty; fill it in, or leave the row out")
    return rows


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Rows with `prompt` or `messages`, and whatever else stands beside these, JSON lines as they are.

    Args:
        path: .txt, a prompt in every line; .jsonl; or what `read_inputs` takes, with a column `prompt`.

    Raises:
        StreamError: the file cannot be read, or a line of it is no prompt; says which.
    """
    if path.suffix.lower() not in (".txt", ".jsonl"):
        return read_inputs(path, ("prompt",)).to_list()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{path} cannot be read: {error}") from error
    rows = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise StreamError(f"{path} holds no prompt")
    return rows


def _prompt(path: Path, number: int, line: str) -> dict[str, Any]:
    if path.suffix.lower() == ".txt":
        return {"prompt": line.rstrip("\r")}
    try:
        row = json.loads(line)
    except ValueError as error:
        raise StreamError(f"{path}, line {number}, is no JSON: {error}") from error
    known = isinstance(row, dict) and (isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list))
    if not known:
        raise StreamError(f"{path}, line {number}, has neither a `prompt` (text) nor `messages` (a list)")
    return row


def asked(row: Mapping[str, Any]) -> Any:
    """The prompt of a row, or its messages."""
    return row["messages"] if isinstance(row.get("messages"), list) else row["prompt"]


def as_inputs(rows: datasets.Dataset, columns: Sequence[str]) -> list[Any]:
    """Each row as `predict` takes it: one value, or a tuple of the values of the input columns."""
    held = [column for column in columns if column in rows.column_names]
    values = [[_value(value) for value in rows[column][:]] for column in held]
    return values[0] if len(held) == 1 else list(zip(*values, strict=True))


def picture(path: str) -> Image.Image:
    """
    Raises:
        StreamError: no image is there, or it is broken.
    """
    try:
        with Image.open(path) as image:
            return eight_bits(image)
    except OSError as error:
        raise StreamError(f"`{path}` is no image that can be read: this run predicts images") from error
    except StreamError as error:
        raise StreamError(f"`{path}`: {error}") from error


def check_output(path: Path) -> None:
    """
    Raises:
        StreamError: a kind of file that is not written, or no folder for it.
    """
    if path.suffix.lower() not in WRITTEN:
        raise StreamError(f"--output writes {', '.join(WRITTEN)}, not `{path.name}`")
    if not path.parent.is_dir():
        raise StreamError(f"there is no folder `{path.parent}` for --output: make it first")


def write_predictions(path: Path, rows: datasets.Dataset, predictions: Sequence[str]) -> None:
    """All columns of the input, and `prediction`, in its order."""
    if "prediction" in rows.column_names:
        rows = rows.remove_columns("prediction")
    frame = rows.add_column("prediction", list(predictions)).to_pandas()
    if path.suffix.lower() == ".jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        _write_frame(path, frame)


def write_generated(path: Path, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> None:
    """The rows of `read_prompts`, each with its answer as `generated`."""
    if path.suffix.lower() == ".jsonl":
        write_text(path, generated_lines(rows, answers))
    else:
        _write_frame(path, pd.DataFrame(_generated(rows, answers)))


def generated_lines(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> str:
    """The same as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _generated(rows, answers))


def _generated(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[dict[str, Any]]:
    return [{**row, "generated": answer} for row, answer in zip(rows, answers, strict=True)]


def _write_frame(path: Path, frame: pd.DataFrame) -> None:
    if path.suffix.lower() == ".csv":
        frame.to_csv(path, index=False, encoding="utf-8")
    else:
        frame.to_parquet(path, index=False)


def _value(value: Any) -> Any:
    return eight_bits(value) if isinstance(value, Image.Image) else value
