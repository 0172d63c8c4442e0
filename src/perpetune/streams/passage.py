"""Prompts in which the passage, the only part that may be cut, is marked."""

from __future__ import annotations

# noncharacters of Unicode: no text has them, JSON and Arrow keep them, and a template leaves them where they are
BEGIN, END = "\ufdd0", "\ufdd1"


def mark(passage: str) -> str:
    """The passage, marked, to be put into a prompt."""
    return f"{BEGIN}{_bare(passage)}{END}"


def unmark(prompt: str) -> tuple[str, int, int]:
    """The prompt without its marks, and where its passage begins and ends; without marks all of it is the passage."""
    before, begun, rest = prompt.partition(BEGIN)
    passage, ended, after = rest.partition(END)
    if not (begun and ended):
        text = _bare(prompt)
        return text, 0, len(text)
    text = before + passage + _bare(after)
    return text, len(before), len(before) + len(passage)


def _bare(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")
