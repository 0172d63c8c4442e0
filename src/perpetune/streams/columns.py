"""Which columns of a file are the inputs and which is the target, and what to type where that cannot be seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..core.errors import StreamError
from .origin import Origin

# what published files call our columns: for hints alone, nothing is renamed unasked
USUAL = {
    "label": "category intent class target y labels sentiment topic gold answer tag emotion fine_label coarse_label "
    "label_text category_name",
    "text": "sentence content utterance query question review comment body message tweet document input sms title "
    "premise description",
    "image": "img picture photo file_name path",
    "caption": "text captions description sentence",
    "response": "answer output completion target label",
    "prompt": "instruction input question query",
}


class Columns(NamedTuple):
    """inputs: as in `Stream.inputs`; target: the column that is learned; names: our name -> the file's, without
    `prompt` where responses are texts that answer nothing."""

    inputs: tuple[str, ...]
    target: str
    names: dict[str, str]

    @property
    def captions(self) -> bool:
        return self.target == "caption"


def find_columns(found: Sequence[str], columns: Mapping[str, str] | None, origin: Origin) -> Columns:
    """The inputs and the target among the columns of a file.

    Args:
        found: as the file names them.
        columns: the file's name -> ours, {"category": "label"}.

    Raises:
        StreamError: a column is missing, or two are to have one name; texts and images, or images in messages.
    """
    names = {name: name for name in found}
    renamed = {old: new for old, new in (columns or {}).items() if old in found}
    for old in renamed:
        names.pop(old, None)
    for old, new in renamed.items():
        if new in renamed.values() and names.get(new, old) in renamed and names.get(new, old) != old:
            raise StreamError(
                f"{origin.whole} has `{names[new]}` and `{old}`, and both are to be called `{new}`: rename one"
            )
        names[new] = old
    inputs = _inputs(names, origin)
    target = "label"
    if inputs == ("image",) and "caption" in names and "label" not in names:
        target = "caption"
    elif inputs[-1] in ("prompt", "messages"):
        target = "response"
    for needed in (*inputs, target):
        if needed not in names and not (needed == "prompt" and alone(names)):
            raise _missing(needed, found, origin)
    return Columns(inputs, target, names)


def alone(names: Iterable[str]) -> bool:
    """Whether there are responses, and nothing that they answer: texts that are learned as they are."""
    names = set(names)
    return "response" in names and names.isdisjoint(("prompt", "messages", "text", "image", "label"))


def _inputs(names: Mapping[str, str], origin: Origin) -> tuple[str, ...]:
    other = {"text", "label", "caption"} if "image" in names else {"text"}
    if alone(names):
        return ("prompt",)
    if "prompt" in names and ("response" in names or other.isdisjoint(names)):
        return ("image", "prompt") if "image" in names else ("prompt",)
    if "messages" in names and not {"text", "image"} & names.keys():
        return ("messages",)
    if {"messages", "image"} <= names.keys() and "label" not in names:
        raise StreamError(
            f"{origin} has `messages` with images, which are not read: write each conversation as `prompt`, with the "
            "model's own marks of turns, and `response`"
        )
    if "image" in names:
        if "text" in names:
            raise StreamError(
                f"{origin} has both `image` and `text`, a task has one: rename the other, {_advice('text', 'caption')}"
            )
        return ("image",)
    return ("text", "text_pair") if "text_pair" in names else ("text",)


def _missing(target: str, found: Sequence[str], origin: Origin) -> StreamError:
    what = "`text` or `image` (or `prompt`, `messages`)" if target == "text" else f"`{target}`"
    usual = {name.lower().strip(): name for name in found}
    likely = [usual[name] for name in USUAL.get(target, "").split() if name in usual]
    others = [name for name in found if name not in ("text", "image", "label")]
    example = [*likely, *others, "name"][0]
    unlabelled = target == "label" and "text" in found
    other = ', or let a language model learn texts as they are, pose="language"' if unlabelled else ""
    listed = ", ".join(f"`{name}`" for name in found)
    return StreamError(
        f"no column {what} in {origin.whole}, which has {listed}: rename one, for instance "
        f"{_advice(example, target)}{other}"
    )


def _advice(old: str, new: str) -> str:
    """What to type where: on the command line, in YAML, in Python."""
    return f'--columns {old}={new}, in YAML columns: {{{old}: {new}}}, in Python columns={{"{old}": "{new}"}}'
