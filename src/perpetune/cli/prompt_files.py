"""Files of prompts, and of the answers to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..core.errors import ConfigError
from ..core.files import write_text


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Rows with `prompt` or `messages`, and whatever else stands beside these.

    Raises:
        ConfigError: the file cannot be read, or a line of it is no prompt; says which.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{path}: prompts are read from .txt, one a line, or .jsonl with prompt or messages")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path} holds no prompt")
    return rows


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    if path.suffix == ".txt":
        return {"prompt": line}
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}, is no JSON: {error}") from error
    known = isinstance(row, dict) and (isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list))
    if not known:
        raise ConfigError(f"{path}, line {number}, has neither a `prompt` (text) nor `messages` (a list)")
    return row


def write_answers(path: Path | None, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> None:
    """The rows with their answers as `generated`, as JSON lines; without a path on stdout."""
    made = ({**row, "generated": answer} for row, answer in zip(rows, answers, strict=True))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    if path is None:
        typer.echo(text, nl=False)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
