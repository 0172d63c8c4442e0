"""What `predict` is asked, checked at the door."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from .errors import ConfigError

EXAMPLES = {
    "text": '["a text", "another"]',
    "text_pair": '[("a text", "its pair")]',
    "prompt": '["a prompt", "another"]',
    "image": "[PIL.Image.open(path)]",
    "messages": '[[{"role": "user", "content": "a question"}]]',
}


def table(inputs: Sequence[Any], columns: Sequence[str]) -> dict[str, list[Any]]:
    """Inputs by column: each input is one value, or a tuple of the values of the first columns.

    Args:
        columns: the input columns of the stream that was learned.

    Raises:
        ConfigError: something else than a sequence of inputs; an input of another kind, or an empty prompt.
    """
    example = f"predict([{EXAMPLES[columns[0]][1:-1]}])"
    if len(columns) > 1:
        example = f"predict([({', '.join(EXAMPLES[c][1:-1].split(', ')[0] for c in columns)})])"
    if isinstance(inputs, (str, bytes, Mapping)):
        raise ConfigError(f"predict takes a list of inputs, and one alone is a list of one, as in {example}")
    rows = [x if isinstance(x, tuple) else (x,) for x in inputs]
    if any(not 0 < len(row) <= len(columns) or len(row) != len(rows[0]) for row in rows):
        raise ConfigError(f"each input holds {', '.join(columns)}, one value for each, as in {example}")
    for number, row in enumerate(rows):
        for column, value in zip(columns, row, strict=False):
            if not _fits(column, value):
                raise ConfigError(f"input {number} is a {type(value).__name__}, and no {column}: ask as in {example}")
        if columns == ("prompt",) and not row[0].strip():
            raise ConfigError(f"input {number} is an empty prompt, which has no answer: leave it out")
    return {column: [row[i] for row in rows] for i, column in enumerate(columns[: len(rows[0])] if rows else ())}


def _fits(column: str, value: Any) -> bool:
    if column == "image":
        return isinstance(value, Image.Image)
    if column != "messages":
        return isinstance(value, str)
    if isinstance(value, str):  # as streams keep them
        try:
            value = json.loads(value)
        except ValueError:
            return False
    turns = value if isinstance(value, list) else [None]
    return bool(turns) and all(
        isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
        for turn in turns
    )
