"""New names for labels, so that tasks that say the same in other words share their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..core.errors import StreamError, nearest
from .rows import Rows
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
    for label in new:
        if label not in known:
            raise StreamError(f"relabel: no task has the label `{label}`: {nearest(label, known)}")
    return [
        replace(
            draft,
            splits={split: _rows(rows, new) for split, rows in draft.splits.items()},
            labels=None if draft.labels is None else _texts(draft.labels, new),
        )
        for draft in drafts
    ]


def _rows(rows: Rows, new: Mapping[str, str | None]) -> Rows:
    kept = rows.pick(np.array([new.get(label, label) is not None for label in rows.labels], dtype=bool))
    texts = np.array([new.get(label, label) for label in kept.labels], dtype=object)
    return replace(kept, labels=texts, order=_texts(rows.order, new))


def _texts(labels: Sequence[str], new: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for label in labels if (text := new.get(label, label)) is not None))
