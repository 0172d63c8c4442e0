"""New names for labels: those that are given, so that tasks that say the same in other words share their classes, and
one form for those that are written in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..core.errors import StreamError, nearest
from .labels import key, warn_of_forms
from .rows import one_form, renamed
from .splitting import Draft


def relabelled(drafts: Sequence[Draft], new: Mapping[str, str | None]) -> list[Draft]:
    """The drafts with other label texts.

    Args:
        new: old label text -> new one, or None to leave out the rows that have it; labels not named stay.

    Raises:
        StreamError: no task has a label that is named.
    """
    known = {str(label) for draft in drafts for rows in draft.splits.values() for label in set(rows.labels)}
    known |= {label for draft in drafts for label in draft.labels or ()}
    by_key = {key(label): label for label in known}
    found = {}
    for label, text in new.items():
        if label not in known and key(label) not in by_key:
            raise StreamError(f"relabel: no task has the label `{label}`: {nearest(label, known)}")
        found[label if label in known else by_key[key(label)]] = text
    return _renamed(drafts, found)


def in_one_form(drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with one text for every class; see `labels`."""
    splits = [rows for draft in drafts for rows in draft.splits.values()]
    return _renamed(drafts, one_form(splits, [label for draft in drafts for label in draft.labels or ()]))


def warn_of_drafts(drafts: Sequence[Draft]) -> None:
    """Warn of classes that differ in the form of their label alone."""
    first: dict[str, str] = {}
    for rows in (rows for draft in drafts for rows in draft.splits.values() if not rows.free_texts):
        positions: dict[str, int] = {}
        for position, label in enumerate(rows.labels):
            positions.setdefault(label, position)
        for label, position in positions.items():
            if label not in first:
                first[label] = rows.origin.called(rows.place).row(int(rows.index[position]))
    warn_of_forms(first)


def _renamed(drafts: Sequence[Draft], new: Mapping[str, str | None]) -> list[Draft]:
    if not new:
        return list(drafts)
    return [
        replace(
            draft,
            splits={split: rows.relabelled(new) for split, rows in draft.splits.items()},
            labels=None if draft.labels is None else renamed(draft.labels, new),
        )
        for draft in drafts
    ]
