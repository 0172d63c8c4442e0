"""What `predict` is asked, checked at the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..core.errors import ConfigError
from .conversations import Conversation, messages_of

EXAMPLES = {
    "text": '"a text"',
    "text_pair": '"its pair"',
    "prompt": '"a prompt"',
    "image": "PIL.Image.open(path)",
    "messages": '[{"role": "user", "content": "a question"}]',
}


def table(inputs: Sequence[Any], columns: Sequence[str]) -> dict[str, list[Any]]:
    """Inputs by column: each input is one value, or a tuple of the values of the first columns.

    Args:
        columns: the input columns of the stream that was learned.

    Raises:
        ConfigError: something else than a sequence of inputs; an input of another kind, or an empty prompt.
    """
    one = ", ".join(EXAMPLES[column] for column in columns)
    example = f"predict([({one})])" if len(columns) > 1 else f"predict([{one}])"
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
    if columns == ("messages",):  # as a stream holds them, without what Arrow would fill in
        return {"messages": [Conversation(messages_of(row[0]) or ()).written() for row in rows]} if rows else {}
    return {column: [row[i] for row in rows] for i, column in enumerate(columns[: len(rows[0])] if rows else ())}


def _fits(column: str, value: Any) -> bool:
    if column == "image":
        return isinstance(value, Image.Image)
    if column != "messages":
        return isinstance(value, str)
    return bool(messages_of(value))
