"""Files as TRL and its users write them, brought to `prompt` and `response`, or to `messages`, before columns are
looked for: `prompt` and `completion`, conversations with tools, ShareGPT, Alpaca, and texts that answer nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Value

from .conversations import Conversation, is_plain, messages_of, parsed, text_of
from .origin import Origin

# what ShareGPT calls the roles
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
_MEND = "{role, content}, contents texts, of which the last is the assistant's and says something"
_ALPACA = {"instruction", "output"}
_OWN = {"messages", "conversations", "completion", "instruction", "input", "output", "tools", "chat_template_kwargs"}


def recognised(data: Dataset, origin: Origin, columns: Mapping[str, str]) -> Dataset:
    """The rows with `messages` (JSON of what is said before the answer) and `response`, or `prompt` and `response`,
    where they are conversations or have `completion`; any other rows as they are.

    | columns | become |
    | --- | --- |
    | `messages` (perhaps `tools`, `chat_template_kwargs`) | `messages`, `response` |
    | `prompt`, `completion`: texts | `prompt`, `response` |
    | `prompt`, `completion`: lists of messages | `messages`, `response` |
    | `conversations` of {from, value} or {role, content} (ShareGPT; perhaps `system`) | `messages`, `response` |
    | `instruction`, `output`, perhaps `input` (Alpaca) | `messages`, `response` |

    Args:
        columns: new names of columns, {"dialogue": "messages"}; those of these formats are given here.

    Raises:
        StreamError: a conversation is none; names the file and the row.
    """
    new = {old: name for old, name in columns.items() if name in _OWN and old in data.column_names}
    data = data.rename_columns(new) if new and not set(new.values()) & set(data.column_names) else data
    names = set(data.column_names)
    if "messages" in names and not names & {"text", "image"}:
        return _conversations(data, data["messages"][:], "messages", origin)
    if "conversations" in names and not names & {"text", "image", "prompt", "label"}:
        systems = data["system"][:] if "system" in names else [None] * len(data)
        read = [_from_value(*row) for row in zip(data["conversations"][:], systems, strict=True)]
        return _conversations(data, read, "conversations", origin)
    if {"prompt", "completion"} <= names and "response" not in names:
        if "messages" not in names and _holds_lists(data, "prompt"):
            both = zip(data["prompt"][:], data["completion"][:], strict=True)
            joined = [[*(parsed(p) or ()), *(parsed(c) or ())] if _lists(p, c) else None for p, c in both]
            return _conversations(data, joined, "prompt` and `completion", origin)
        return data.rename_column("completion", "response")
    if names >= _ALPACA and not names & {"text", "label", "prompt", "response", "image"}:
        return _conversations(data, [_alpaca(row) for row in data], "instruction` and `output", origin)
    return data


def _conversations(data: Dataset, rows: Sequence[Any], column: str, origin: Origin) -> Dataset:
    settings = _settings(data, origin)
    before, answers = [], []
    for i, row in enumerate(rows):
        messages = messages_of(row)
        if messages is None or len(messages) < 2 or messages[-1]["role"] != "assistant" or not text_of(messages[-1]):
            raise origin.refusal(i, f": `{column}` must be a list of {_MEND}")
        own = settings[i] if settings else {}
        answer = None if is_plain(messages[-1]) else messages[-1]
        before.append(Conversation(messages[:-1], own, answer).written())
        answers.append(text_of(messages[-1]))
    columns = {"messages": before, "response": answers}
    return Dataset.from_dict(columns, features=Features({name: Value("string") for name in columns}))


def _settings(data: Dataset, origin: Origin) -> list[dict[str, Any]]:
    """What a template takes besides messages, of each row; nothing where no row has any."""
    found: list[dict[str, Any]] = [{} for _ in range(len(data))]
    for name in ("tools", "chat_template_kwargs"):
        for i, value in enumerate(data[name][:] if name in data.column_names else ()):
            if value in (None, "", [], {}):
                continue
            value = parsed(value)
            if not isinstance(value, list if name == "tools" else dict):
                kind = "a list of tools" if name == "tools" else "an object"
                raise origin.refusal(i, f": `{name}` must be {kind}, or the JSON of it")
            found[i] |= {"tools": value} if name == "tools" else value
    return found if any(found) else []


def _from_value(row: Any, system: str | None) -> Any:
    """Messages of {from, value}, behind what the system says."""
    row = parsed(row)
    if not isinstance(row, list) or not all(isinstance(turn, dict) for turn in row):
        return None
    if any("role" in turn for turn in row):
        return row
    if any(turn.get("from") not in ROLES for turn in row):
        return None
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": ROLES[turn["from"]], "content": turn.get("value")} for turn in row)]


def _alpaca(row: dict[str, Any]) -> Any:
    asked = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _holds_lists(data: Dataset, column: str) -> bool:
    return any(isinstance(value, list) for value in data[column][:2]) or _lists(*data[column][:1])


def _lists(*values: Any) -> bool:
    return all(isinstance(value, list) for value in values)
