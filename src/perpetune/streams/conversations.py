"""Conversations as chat templates take them: messages with roles, perhaps calls of tools, perhaps contents in parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .passage import BEGIN, mark

KEYS = ("role", "content")  # of a plain message


@dataclass(frozen=True)
class Conversation:
    """What is said before an answer, and with which settings the template writes it.

    Attributes:
        messages: {role, content}, content a text or parts ({type: text, text: …}); perhaps `tool_calls` and what else a
            template takes.
        settings: `tools` and other arguments of `apply_chat_template`.
        answer: the message that answers, where it is more than a text.
    """

    messages: Sequence[dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] | None = None

    @classmethod
    def read(cls, value: Any) -> Conversation:
        """From a list of messages, from what `written` wrote, or from the JSON of either."""
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, Mapping):
            return cls([dict(m) for m in value["messages"]], value.get("settings") or {}, value.get("answer"))
        return cls([dict(m) for m in value])

    def written(self) -> str:
        """As JSON: a list where it holds messages alone."""
        messages: Any = list(self.messages)
        if self.settings or self.answer:
            messages = {"messages": messages, "settings": self.settings, "answer": self.answer}
        return json.dumps(messages, ensure_ascii=False)

    def first(self, count: int) -> Conversation:
        """Its first messages."""
        return replace(self, messages=self.messages[:count])

    def answered(self) -> Conversation:
        """With the answer as its last message."""
        return replace(self, messages=[*self.messages, *([self.answer] if self.answer else [])])

    def marked(self) -> Conversation:
        """The same with its longest text marked as its passage (see `passage`), where none is marked."""
        texts = [(i, j, text) for i, message in enumerate(self.messages) for j, text in _texts(message)]
        if not texts or any(BEGIN in text for _, _, text in texts):
            return self
        i, j, text = max(texts, key=lambda found: len(found[2]))
        messages = [dict(m) for m in self.messages]
        if j is None:
            messages[i]["content"] = mark(text)
        else:
            parts = [dict(p) for p in messages[i]["content"]]
            parts[j]["text"] = mark(text)
            messages[i]["content"] = parts
        return replace(self, messages=messages)


def _texts(message: Mapping[str, Any]) -> list[tuple[int | None, str]]:
    """(the number of the part, the text) of each text in a message; None for a content that is one."""
    content = message.get("content")
    if isinstance(content, str):
        return [(None, content)]
    return [(j, part["text"]) for j, part in enumerate(content or ()) if isinstance(part.get("text"), str)]


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says: its text, the texts of its parts joined, and the calls of tools as JSON."""
    said = "".join(text for _, text in _texts(message))
    calls = message.get("tool_calls")
    return said + (json.dumps([call.get("function", call) for call in calls], ensure_ascii=False) if calls else "")


def messages_of(value: Any) -> list[dict[str, Any]] | None:
    """A list of messages (or its JSON) without the keys that are null there, as Arrow fills them in; None for anything
    else."""
    value = parsed(value)
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return None
    found = [{k: _without_nulls(v) for k, v in m.items() if v is not None or k == "content"} for m in value]
    return found if all(map(_is_message, found)) else None


def parsed(value: Any) -> Any:
    """What JSON in a text says; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None


def _is_message(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        return False
    if content is None:
        return bool(message.get("tool_calls"))
    if isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def is_plain(message: Mapping[str, Any]) -> bool:
    """Whether a message is a role and a text alone."""
    return set(message) == set(KEYS) and isinstance(message["content"], str)
