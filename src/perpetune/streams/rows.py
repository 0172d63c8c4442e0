"""The rows of one split on their way into a task: columns named, labels as text, nothing copied."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets

from ..core.errors import StreamError
from .chat_formats import recognised
from .columns import find_columns
from .hashing import sample_ids
from .labels import check_classes, is_whole, label_text, loose_key, one_text
from .origin import Origin, warn
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
        origin: where the rows of `data` are from, for messages.
        numbers: whether labels that look like numbers are some: in files with types as their type says, in those
            without always.
        alone: whether the labels are texts that answer nothing; their prompts are empty, and the texts are the content.
    """

    place: str
    data: Dataset
    index: np.ndarray
    labels: np.ndarray
    order: tuple[str, ...] = ()
    captions: bool = False
    origin: Origin = Origin("")
    numbers: bool = False
    alone: bool = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def _named(self) -> Origin:
        """Where the rows are from, under the name of this split."""
        return self.origin.called(self.place)

    @property
    def free_texts(self) -> bool:
        """Whether the labels are answers to prompts or captions, which need not occur in the training data."""
        return self.captions or not PROMPTS.isdisjoint(self.data.column_names)

    def strata(self, count: int) -> np.ndarray:
        """(n,) what a choice of so many rows is stratified by: labels; nothing where free texts are more than that."""
        few = not self.free_texts or len(set(self.labels)) <= count
        return self.labels if few else np.full(len(self), "", dtype=object)

    def first(self, labels: Sequence[str]) -> str:
        """The first row that has one of these labels, for messages."""
        return self.origin.at(int(self.index[np.isin(self.labels, labels)][0]))

    def check_classes(self) -> None:
        """Raises StreamError if the labels are a continuous target."""
        if self.numbers and not self.free_texts:
            check_classes(self.labels, self._named.whole)

    def pick(self, positions: np.ndarray, place: str | None = None) -> Rows:
        """The rows at these positions of `index` (or where a mask of its length is true)."""
        return replace(self, place=place or self.place, index=self.index[positions], labels=self.labels[positions])

    def relabelled(self, new: Mapping[str, str | None]) -> Rows:
        """The rows with other label texts, without those whose label becomes None; labels not named stay."""
        if not new:
            return self
        kept = self.pick(np.array([new.get(label, label) is not None for label in self.labels], dtype=bool))
        texts = np.array([new.get(label, label) for label in kept.labels], dtype=object)
        return replace(kept, labels=texts, order=renamed(self.order, new))

    def split_off(self, share: float, *key: object, strata: np.ndarray | None = None) -> tuple[Rows, Rows]:
        """(the rest, a stratified share); every class keeps at least one row in the rest.

        Of captions a share of the images, of each of which one caption is asked for and none is left in the rest.
        """
        if self.captions:
            _, first, image = np.unique(
                sample_ids(self.data, self.index, self._named), return_index=True, return_inverse=True
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
        if self.alone:
            texts = Dataset.from_dict({"text": self.labels.tolist()}, features=Features({"text": Value("string")}))
            ids[self.index] = sample_ids(texts, np.arange(len(texts)), self._named)
        else:
            ids[self.index] = sample_ids(self.data, self.index, self._named)
        labels = np.full(len(self.data), -1, dtype=np.int64)
        labels[self.index] = [classes[label] for label in self.labels]
        # ids, labels and places say all that these rows hold: left alone, `datasets` would pickle whole columns to know
        stamp = hashlib.sha256("\n".join(ids[self.index]).encode() + labels.tobytes()).hexdigest()[:32]
        data = self.data.add_column("id", ids.tolist(), new_fingerprint=f"{stamp}-id", feature=Value("string"))
        data = data.add_column("label", labels, new_fingerprint=f"{stamp}-label", feature=Value("int64"))
        data = data.select_columns(["id", "label", *self.data.column_names])
        return data if len(self) == len(data) else data.select(self.index, new_fingerprint=f"{stamp}-rows")


def open_rows(
    data: Dataset, place: str | Origin, columns: Mapping[str, str] | None = None, folder: Path | None = None
) -> Rows:
    """Find the inputs and the labels of one split.

    Args:
        data: as read.
        place: "the train split of task `x`", for messages, or where the rows are from.
        columns: new names of columns, {"sentence": "text"}.
        folder: where paths of images start.

    Raises:
        StreamError: the split is empty, a column is missing or of the wrong type, a text, a label or an answer is null,
            a label, an answer or a prompt is empty, or a conversation does not end with an answer.
    """
    origin = Origin.of(place)
    if len(data):
        data = recognised(data, origin, columns or {})
    inputs, target, names = found = find_columns(data.column_names, columns, origin)
    if len(data) == 0:
        raise StreamError(f"{origin} is empty")
    free, alone = found.captions or not PROMPTS.isdisjoint(inputs), inputs == ("prompt",) and "prompt" not in names
    labels, order = _label_texts(data, names[target], origin, free=free)
    numbers = origin.untyped or getattr(data.features[names[target]], "dtype", "").startswith("float")
    if free:
        labels = _answers(labels, origin, "captions" if found.captions else "answers")
    if alone:
        data = data.add_column("prompt", [""] * len(data), feature=Value("string"))
        names = {**names, "prompt": "prompt"}
    strays = {n: origin.strays[names[n]] for n in inputs if n != "messages" and names[n] in origin.strays}
    data = data.select_columns([names[name] for name in inputs])
    data = data.rename_columns({names[name]: name for name in inputs if names[name] != name})
    for name in inputs:
        if name in strays:
            raise StreamError(f"column `{name}` of {origin} holds no text in {origin.at(strays[name])}: quote it")
        data = _checked(data, name, origin, folder)
    if inputs == ("prompt",) and not alone:
        _filled([prompt.strip() for prompt in data["prompt"][:]], origin, "prompts")
    elif inputs[0] == "text" and origin.files:  # what was published stays as it was published
        texts = zip(*(data[name][:] for name in inputs), strict=True)
        empty = [row for row, text in enumerate(texts) if not "".join(text).strip()]
        if empty:
            warn(f"{len(empty)} of {len(data)} texts of {origin} are empty, the first is {origin.at(empty[0])}")
    return Rows(origin.place, data, np.arange(len(data)), labels, order, found.captions, origin, numbers, alone)


def _checked(data: Dataset, name: str, origin: Origin, folder: Path | None) -> Dataset:
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
            raise StreamError(f"column `image` of {origin.whole} holds {_kind(feature)}, not images")
        # always decoded, whatever the file's metadata asks for
        return data if isinstance(feature, Image) and feature.decode else data.cast_column(name, Image())
    nulls = data.data.column(name).null_count
    if nulls:
        row = data.data.column(name).is_null().to_pylist().index(True)
        raise StreamError(
            f"{nulls} of {len(data)} texts in column `{name}` of {origin} are null, the first in {origin.at(row)}"
        )
    if getattr(feature, "dtype", None) not in TEXT_TYPES:
        raise StreamError(f"column `{name}` of {origin.whole} holds {_kind(feature)}, not text: quote or convert it")
    return data


def _answers(labels: np.ndarray, origin: Origin, what: str) -> np.ndarray:
    """(n,) the answers as they are, or captions without blanks around them."""
    bare = _filled([label.strip() for label in labels], origin, what)
    return bare if what == "captions" else labels


def _filled(texts: Sequence[str], origin: Origin, what: str) -> np.ndarray:
    empty = [row for row, text in enumerate(texts) if not text]
    if empty:
        raise StreamError(
            f"{len(empty)} of {len(texts)} {what} of {origin} are empty, the first is {origin.at(empty[0])}: fill or "
            "remove them"
        )
    return np.array(texts, dtype=object)


def _kind(feature: object) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _label_texts(data: Dataset, column: str, origin: Origin, *, free: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n,) label texts, and the order that a ClassLabel column declares. `free`: answers and captions, which stay as
    they are written."""
    values, order = column_texts(data, column)
    if not all(isinstance(value, (str, int, float, NoneType)) for value in values):
        raise StreamError(
            f"column `{column}` of {origin.whole} holds {_kind(data.features[column])}, not one label a row"
        )
    lacking = [row for row, value in enumerate(values) if value is None or value != value]
    # a column with gaps writes 1 as 1.0; among numbers that are not whole, 1.0 is how it is written
    whole = all(value.is_integer() for value in values if isinstance(value, float) and math.isfinite(value))
    texts = [
        value if free and isinstance(value, str) else label_text(value if whole else str(value)) for value in values
    ]
    if not free and not lacking:
        invisible = {text for text in set(texts) if not loose_key(text)}
        lacking = [row for row, text in enumerate(texts) if text in invisible]
    if lacking:
        raise StreamError(
            f"{len(lacking)} of {len(data)} rows of {origin} have no label, the first is {origin.at(lacking[0])}: "
            "label or remove them"
        )
    endless = next((row for row, value in enumerate(values) if isinstance(value, float) and math.isinf(value)), None)
    if endless is not None:
        raise origin.refusal(endless, " has an infinite label, which is no class: mend it")
    return np.array(texts, dtype=object), tuple(dict.fromkeys(map(label_text, order)))


def column_texts(data: Dataset, column: str) -> tuple[list, tuple[str, ...]]:
    """The values of a column, those of a ClassLabel column by name (None for -1), and the order that it declares."""
    values, feature = data[column][:], data.features[column]
    if not isinstance(feature, ClassLabel) or feature.names is None:
        return values, ()
    return [feature.names[v] if v is not None and v >= 0 else None for v in values], tuple(feature.names)


def renamed(labels: Iterable[str], new: Mapping[str, str | None]) -> tuple[str, ...]:
    """New label texts, those that become one named once."""
    return tuple(dict.fromkeys(text for label in labels if (text := new.get(label, label)) is not None))


def one_form(splits: Iterable[Rows], declared: Iterable[str] = ()) -> dict[str, str]:
    """New texts for the labels of classes that are written in several ways; see `labels`.

    Args:
        declared: labels that are listed beside the rows.
    """
    classes = [rows for rows in splits if not rows.free_texts]
    present = [dict.fromkeys(rows.labels) for rows in classes]
    listed = (label for rows, own in zip(classes, present, strict=True) for label in (*rows.order, *own))
    untyped = [own for rows, own in zip(classes, present, strict=True) if rows.origin.untyped]
    return one_text([*declared, *listed], [label for own in untyped if all(map(is_whole, own)) for label in own])


def in_order(labels: np.ndarray, *orders: tuple[str, ...]) -> list[str]:
    """The distinct labels: in the first of `orders` that names them all, else sorted, whole numbers by value."""
    present = set(labels)
    for order in orders:
        if present <= set(order):
            return [label for label in order if label in present]
    return sorted(present, key=lambda t: (0, int(t), t) if re.fullmatch(r"-?\d+", t) else (1, 0, t))
