"""The rows of one split on their way into a task: columns named, labels as text, nothing copied."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets

from ..core.errors import StreamError
from .hashing import sample_ids
from .sampling import stratified

TEXT_TYPES = ("string", "large_string", "string_view")
PROMPTS = {"prompt", "messages"}


@dataclass(frozen=True)
class Rows:
    """Some rows of one split.

    Attributes:
        place: "the train split of task `x`", for messages.
        data: the input columns of the whole table, under the names that `Task` gives them.
        index: (n,) rows of `data` that belong here, ascending.
        labels: (n,) their label texts.
        order: the label texts in the order that the file declares; empty where it declares none.
        captions: whether the labels are captions of images.
    """

    place: str
    data: Dataset
    index: np.ndarray
    labels: np.ndarray
    order: tuple[str, ...] = ()
    captions: bool = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def free_texts(self) -> bool:
        """Whether the labels are answers to prompts or captions, which need not occur in the training data."""
        return self.captions or not PROMPTS.isdisjoint(self.data.column_names)

    def strata(self, count: int) -> np.ndarray:
        """(n,) what a choice of so many rows is stratified by: labels; nothing where free texts are more than that."""
        few = not self.free_texts or len(set(self.labels)) <= count
        return self.labels if few else np.full(len(self), "", dtype=object)

    def pick(self, positions: np.ndarray, place: str | None = None) -> Rows:
        """The rows at these positions of `index` (or where a mask of its length is true)."""
        return replace(self, place=place or self.place, index=self.index[positions], labels=self.labels[positions])

    def split_off(self, share: float, *key: object, strata: np.ndarray | None = None) -> tuple[Rows, Rows]:
        """(the rest, a stratified share); every class keeps at least one row in the rest.

        Of captions a share of the images, of each of which one caption is asked for and none is left in the rest.
        """
        if self.captions:
            _, first, image = np.unique(
                sample_ids(self.data, self.index, self.place), return_index=True, return_inverse=True
            )
            chosen = stratified(np.full(len(first), ""), round(share * len(first)), *key, spare=1)
            return self.pick(~np.isin(image, chosen)), self.pick(np.sort(first[chosen]))
        count = round(share * len(self))
        off = np.zeros(len(self), dtype=bool)
        off[stratified(self.strata(count) if strata is None else strata, count, *key, spare=1)] = True
        return self.pick(~off), self.pick(off)

    def finish(self, classes: Mapping[str, int]) -> Dataset:
        """The rows with the columns `id`, `label` and the inputs; only these rows are hashed, and none is copied."""
        ids = np.full(len(self.data), "", dtype=object)
        ids[self.index] = sample_ids(self.data, self.index, self.place)
        labels = np.full(len(self.data), -1, dtype=np.int64)
        labels[self.index] = [classes[label] for label in self.labels]
        # ids, labels and places say all that these rows hold: left alone, `datasets` would pickle whole columns to know
        stamp = hashlib.sha256("\n".join(ids[self.index]).encode() + labels.tobytes()).hexdigest()[:32]
        data = self.data.add_column("id", ids.tolist(), new_fingerprint=f"{stamp}-id", feature=Value("string"))
        data = data.add_column("label", labels, new_fingerprint=f"{stamp}-label", feature=Value("int64"))
        data = data.select_columns(["id", "label", *self.data.column_names])
        return data if len(self) == len(data) else data.select(self.index, new_fingerprint=f"{stamp}-rows")


def open_rows(data: Dataset, place: str, columns: Mapping[str, str] | None = None, folder: Path | None = None) -> Rows:
    """Find the inputs and the labels of one split.

    Args:
        data: as read.
        place: "the train split of task `x`", for messages.
        columns: new names of columns, {"sentence": "text"}.
        folder: where paths of images start.

    Raises:
        StreamError: the split is empty, a column is missing or of the wrong type, a text, a label or an answer is null,
            an answer or a prompt is empty, or a conversation does not end with one.
    """
    names = {name: name for name in data.column_names}  # name here -> name in the file
    for old in columns or {}:
        if old in data.column_names:
            names.pop(old, None)
    names.update({new: old for old, new in (columns or {}).items() if old in data.column_names})
    inputs = _inputs(names, place)
    captions = inputs == ("image",) and "caption" in names and "label" not in names
    own = ("caption",) if captions else ("label",)
    target = {"prompt": ("response",), "messages": ()}.get(inputs[-1], own)
    for needed in (*inputs, *target):
        if needed not in names:
            raise _missing(f"`{needed}`", data, place)
    if len(data) == 0:
        raise StreamError(f"{place} is empty")
    if inputs == ("messages",):
        data, answers = _conversations(data[names["messages"]][:], place)
        return Rows(place, data, np.arange(len(data)), _answers(answers, place))
    labels, order = _label_texts(data, names[target[0]], place)
    if captions or "prompt" in inputs:
        labels = _answers(labels, place, "captions" if captions else "answers")
    data = data.select_columns([names[name] for name in inputs])
    data = data.rename_columns({names[name]: name for name in inputs if names[name] != name})
    for name in inputs:
        data = _checked(data, name, place, folder)
    if inputs == ("prompt",):
        _filled(np.array([prompt.strip() for prompt in data["prompt"][:]], dtype=object), place, "prompts")
    return Rows(place, data, np.arange(len(data)), labels, order, captions)


def _inputs(names: Mapping[str, str], place: str) -> tuple[str, ...]:
    other = {"text", "label", "caption"} if "image" in names else {"text"}
    if "prompt" in names and ("response" in names or other.isdisjoint(names)):
        return ("image", "prompt") if "image" in names else ("prompt",)
    if "messages" in names and not {"text", "image"} & names.keys():
        return ("messages",)
    if {"messages", "image"} <= names.keys() and "label" not in names:
        raise StreamError(
            f"{place} has `messages` with images, which are not read: write each conversation as `prompt`, with the "
            "model's own marks of turns, and `response`"
        )
    if "image" in names:
        if "text" in names:
            raise StreamError(
                f'{place} has both `image` and `text`, a task has one: rename the other, columns={{"text": "caption"}}'
            )
        return ("image",)
    return ("text", "text_pair") if "text_pair" in names else ("text",)


def _missing(what: str, data: Dataset, place: str) -> StreamError:
    target = what.strip("`")
    what = "`text` or `image` (or `prompt`, `messages`)" if what == "`text`" else what
    found = ", ".join(f"`{name}`" for name in data.column_names)
    example = next((name for name in data.column_names if name not in ("text", "image", "label")), "name")
    return StreamError(
        f'no column {what} in {place}, which has {found}: rename one, for instance columns={{"{example}": "{target}"}}'
    )


def _checked(data: Dataset, name: str, place: str, folder: Path | None) -> Dataset:
    """The column as text without nulls, or as images."""
    feature = data.features[name]
    if name == "image":
        if folder is not None and getattr(feature, "dtype", None) in TEXT_TYPES:
            paths = [None if path is None else str(folder / path) for path in data[name][:]]
            made = Dataset.from_dict({name: paths}, features=Features({name: Image()}))
            others = data.remove_columns(name)
            return concatenate_datasets([made, others], axis=1) if others.column_names else made
        # an image may come as bytes, or as {bytes, path} from a Parquet file without the metadata of `datasets`
        binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
        struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        if not (isinstance(feature, Image) or binary or struct):
            raise StreamError(f"column `image` of {place} holds {_kind(feature)}, not images")
        # always decoded, whatever the file's metadata asks for
        return data if isinstance(feature, Image) and feature.decode else data.cast_column(name, Image())
    nulls = data.data.column(name).null_count
    if nulls:
        row = data.data.column(name).is_null().to_pylist().index(True)
        raise StreamError(
            f"{nulls} of {len(data)} texts in column `{name}` of {place} are null, the first in row {row}"
        )
    if getattr(feature, "dtype", None) not in TEXT_TYPES:
        raise StreamError(f"column `{name}` of {place} holds {_kind(feature)}, not text: quote or convert it")
    return data


def _answers(labels: Iterable[str], place: str, what: str = "answers") -> np.ndarray:
    """(n,) the answers, or captions, without blanks around them."""
    return _filled(np.array([label.strip() for label in labels], dtype=object), place, what)


def _filled(texts: np.ndarray, place: str, what: str) -> np.ndarray:
    empty = np.flatnonzero(texts == "")
    if len(empty):
        raise StreamError(f"{len(empty)} of {len(texts)} {what} of {place} are empty, the first is row {empty[0]}")
    return texts


def _conversations(rows: Sequence[object], place: str) -> tuple[Dataset, list[str]]:
    """(the messages before the answer, as JSON in the column `messages`; the answers): the last message of every row is
    the answer, all before it is prompt."""
    before, answers = [], []
    for i, row in enumerate(rows):
        texts = turns(row)
        if texts is None or len(texts) < 2 or texts[-1][0] != "assistant":
            raise StreamError(
                f"row {i} of {place}: `messages` must be a list of {{role, content}}, texts both, of which the last is "
                "the assistant's"
            )
        before.append(json.dumps([{"role": role, "content": text} for role, text in texts[:-1]], ensure_ascii=False))
        answers.append(texts[-1][1])
    return Dataset.from_dict({"messages": before}, features=Features({"messages": Value("string")})), answers


def turns(conversation: object) -> list[tuple[str, str]] | None:
    """(role, content) of every message of a list of {role, content}, or of its JSON; None for anything else."""
    if isinstance(conversation, str):
        try:
            conversation = json.loads(conversation)
        except ValueError:
            return None
    if not isinstance(conversation, list) or not all(isinstance(message, Mapping) for message in conversation):
        return None
    found = [(message.get("role"), message.get("content")) for message in conversation]
    return found if all(isinstance(text, str) for pair in found for text in pair) else None


def _kind(feature: object) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _label_texts(data: Dataset, column: str, place: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n,) label texts, and the order that a ClassLabel column declares."""
    values, order = column_texts(data, column)
    unlabelled = [row for row, value in enumerate(values) if value is None or value != value]
    if unlabelled:
        raise StreamError(
            f"{len(unlabelled)} of {len(data)} rows of {place} have no label, the first is row {unlabelled[0]}: "
            "label or remove them"
        )
    if not all(isinstance(value, (str, int, float)) for value in values):
        raise StreamError(f"column `{column}` of {place} holds {_kind(data.features[column])}, not one label a row")
    return np.array([str(value) for value in values], dtype=object), order


def column_texts(data: Dataset, column: str) -> tuple[list, tuple[str, ...]]:
    """The values of a column, those of a ClassLabel column by name (None for -1), and the order that it declares."""
    values, feature = data[column][:], data.features[column]
    if not isinstance(feature, ClassLabel) or feature.names is None:
        return values, ()
    return [feature.names[v] if v is not None and v >= 0 else None for v in values], tuple(feature.names)


def in_order(labels: np.ndarray, *orders: tuple[str, ...]) -> list[str]:
    """The distinct labels: in the first of `orders` that names them all, else sorted, whole numbers by value."""
    present = set(labels)
    for order in orders:
        if present <= set(order):
            return [label for label in order if label in present]
    return sorted(present, key=lambda t: (0, int(t), t) if re.fullmatch(r"-?\d+", t) else (1, 0, t))
