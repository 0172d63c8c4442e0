"""What a task adds to the state of a head: the rows of classes that it changed, and what the head keeps of it alone.

The state of a head has rows of classes (`Head.class_axis`; the texts are in `labels`), parts of single tasks
(`Head.task_parts`, whose `.classes` are positions in `labels`), and whatever else there is, of a size that does not
grow with the tasks. A commit holds new and changed rows and the parts of new tasks (`added`), and all the rest
(`sums`): the states of a run are put together from the first of every commit and the second of the newest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Head

State = dict[str, Tensor]


def increment(head: Head, before: State, after: State) -> tuple[State, State]:
    """What a commit holds of a head: (added, sums).

    Args:
        before, after: `head.state()` at the last commit (empty: there is none), and now; no class was forgotten between
            them. Of `after`, what tasks that had finished at the last commit left may be missing (`Head.recent_state`),
            of `before` what any task left.
    """
    if not head.class_axis or "labels" not in after:
        return {}, after
    axes = _axes(head, after)
    known, texts = {text: i for i, text in enumerate(_texts(before))}, _texts(after)
    parts = {key: t for key, t in after.items() if _of_task(head, key) and key not in before}
    used = {i for key, t in parts.items() if key.endswith(".classes") for i in t.tolist()}
    rows = [i for i, text in enumerate(texts) if i in used or text not in known]
    old = [i for i, text in enumerate(texts) if text in known and i not in used]
    if old:
        there = torch.tensor([known[texts[i]] for i in old])
        changed = torch.zeros(len(old), dtype=torch.bool)
        for key, axis in axes.items():
            now, then = after[key].index_select(axis, torch.tensor(old)), before[key].index_select(axis, there)
            changed |= (now != then).movedim(axis, 0).flatten(1).any(1) if now.ndim > 1 else now != then
        rows = sorted([*rows, *(i for i, c in zip(old, changed.tolist(), strict=True) if c)])
    index = torch.tensor(rows, dtype=torch.long)
    place = torch.full((len(texts),), -1, dtype=torch.long)
    place[index] = torch.arange(len(rows))
    added = {key: after[key].index_select(axis, index) for key, axis in axes.items()}
    added |= {key: place[t] if key.endswith(".classes") else t for key, t in parts.items()}
    rest = {key: t for key, t in after.items() if key not in axes and not _of_task(head, key)}
    return {**added, "labels": _as_tensor([texts[i] for i in rows])}, {k: t for k, t in rest.items() if k != "labels"}


def combined(head: Head, added: Sequence[State], sums: State) -> State:
    """The state of a head from what commits hold of it.

    Args:
        added: of every commit, in order; the first may be a whole state. sums: of the newest.
    """
    added = [state for state in added if "labels" in state]
    if not added:
        return sums
    of: dict[str, tuple[int, int]] = {}  # the newest state with the row of a class, and where it is there
    for number, state in enumerate(added):
        of |= {text: (number, i) for i, text in enumerate(_texts(state))}
    texts = sorted(of, key=lambda text: of[text])
    places = {text: i for i, text in enumerate(texts)}
    taken: list[list[int]] = [[] for _ in added]
    for number, i in sorted(of.values()):
        taken[number].append(i)
    axes = _axes(head, added[-1])
    found = {key: t for key, t in added[0].items() if key not in axes and not _of_task(head, key)} | sums
    for key, axis in axes.items():
        kept = [s[key].index_select(axis, torch.tensor(i).long()) for s, i in zip(added, taken, strict=True)]
        found[key] = torch.cat(kept, axis)
    for state in added:
        own = _texts(state)
        for key, t in state.items():
            if _of_task(head, key):
                found[key] = torch.tensor([places[own[i]] for i in t.tolist()]) if key.endswith(".classes") else t
    return {**found, "labels": _as_tensor(texts)}


def _axes(head: Head, state: State) -> dict[str, int]:
    """The axis of the rows of classes, by the name of a part: its last word, behind the prefix of a map of features."""
    kinds = {key: key.rpartition(".")[2] for key in state if not _of_task(head, key)}
    return {key: head.class_axis[kind] for key, kind in kinds.items() if kind in head.class_axis}


def _of_task(head: Head, key: str) -> bool:
    return bool(head.task_parts) and key.startswith(head.task_parts)


def _texts(state: State) -> list[str]:
    return json.loads(bytes(state["labels"].tolist())) if "labels" in state else []


def _as_tensor(texts: Sequence[str]) -> Tensor:
    return torch.tensor(list(json.dumps(list(texts), ensure_ascii=False).encode()), dtype=torch.uint8)
