"""One text for every label, whatever the file wrote: `1`, `1.0` and "1" are one class, and so are `true` and `True`.

What is certain is brought into one form: whole numbers, truth values, blanks around a text, and the composition of its
characters (Unicode NFC). Case, blanks within and other forms of characters may mean something: such labels stay classes
of their own, and are warned of.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..core.errors import StreamError
from .origin import warn

WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")  # as columns of floats are written
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MOST_CLASSES = 20  # that are numbers and not whole; more are taken for a continuous target
FEWEST_ROWS = 8  # from which on a target is continuous, too, if hardly a number occurs twice
MOST_WARNINGS = 5


def label_text(value: object) -> str:
    """The text of a label of any type: 1.0 is "1", and True is "True"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value)).strip()


def key(label: str) -> str:
    """The same for two label texts if and only if they certainly are one class."""
    label = label_text(label)
    whole = WHOLE.fullmatch(label)
    return whole[1] if whole else label.lower() if label.lower() in ("true", "false") else label


def is_whole(label: str) -> bool:
    """Whether a label is a whole number, as integer or as float."""
    return re.fullmatch(r"[+-]?[0-9]+(\.0+)?", label) is not None


def loose_key(label: str) -> str:
    """The same for two label texts that differ in case, blanks, invisible characters or Unicode's forms at most."""
    text = unicodedata.normalize("NFKC", key(label)).casefold()
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


def one_text(labels: Iterable[str], whole: Iterable[str] = ()) -> dict[str, str]:
    """New texts for labels that have several forms: the whole number, else the form that comes first.

    Args:
        labels: in the order of their appearance.
        whole: those of them that stand in files without types, where 1.0 is how a column with gaps writes 1.
    """
    forms: dict[str, dict[str, None]] = defaultdict(dict)
    for label in labels:
        forms[key(label)][label] = None
    sure = {key(label) for label in whole}
    new = {}
    for common, texts in forms.items():
        number = any(WHOLE.fullmatch(text) for text in texts) and (len(texts) > 1 or common in sure)
        text = common if number else next(iter(texts))
        new.update({label: text for label in texts if label != text})
    return new


def check_classes(labels: Sequence[str] | np.ndarray, place: str) -> None:
    """Labels that are numbers are classes as long as they are few, or whole.

    Raises:
        StreamError: they are a continuous target.
    """
    values = set(labels)
    if not all(map(NUMBER.fullmatch, values)) or all(float(value).is_integer() for value in values):
        return
    if len(values) > MOST_CLASSES or (len(labels) >= FEWEST_ROWS and len(values) > len(labels) / 2):
        raise StreamError(
            f"the labels of {place} are a continuous target ({len(values)} numbers in {len(labels)} rows, such as "
            f"{min(values, key=float)} and {max(values, key=float)}), and tasks have classes: cut it into ranges with "
            "a name each (low, high), or quote the numbers in JSON if they are names"
        )


def warn_of_forms(first: Mapping[str, str]) -> None:
    """Warn of labels that differ in form alone.

    Args:
        first: label text -> where it occurs first, in the order of their appearance.
    """
    known: dict[str, str] = {}
    pairs = [(known[loose], label) for label in first if known.setdefault(loose := loose_key(label), label) != label]
    for old, new in pairs[:MOST_WARNINGS]:
        more = f" ({len(pairs)} such labels)" if len(pairs) > MOST_WARNINGS else ""
        warn(
            f"label {new!r} in {first[new]} is {old!r} in {first[old]} but for its form (case, blanks, Unicode), and a "
            f"class of its own{more}: if they are one, write them alike, or relabel: {{{new!r}: {old!r}}}"
        )
