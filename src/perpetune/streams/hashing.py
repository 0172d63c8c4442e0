"""Content hashes: of samples, so that duplicates are known wherever they appear; of tasks, so that a resumed run can
tell whether it still has the same data; of files, so that a changed file is never served from a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import Dataset, Image

from ..core.errors import StreamError
from .origin import Origin
from .pictures import check
from .task import Task

_BATCH = 1024  # rows held in memory at a time


def sample_ids(data: Dataset, index: np.ndarray, place: str | Origin) -> list[str]:
    """sha1 of each chosen row's inputs, without its label: texts as UTF-8, images as they are encoded.

    Each input is preceded by its length, so that ("ab", "c") and ("a", "bc") differ. Equal inputs have equal ids even
    where their labels contradict each other, so that they stay together whenever data is divided by id.

    Args:
        data: the input columns, in order.
        index: (n,) rows of `data` to hash.
        place: where the rows come from, for messages.

    Raises:
        StreamError: an image is missing, broken or cut short.
    """
    origin = Origin.of(place)
    arrow = data.with_format("arrow")
    ids = []
    for start in range(0, len(index), _BATCH):
        rows = index[start : start + _BATCH]
        columns = []
        for name, feature in data.features.items():
            values = arrow[rows].column(name).to_pylist()
            if isinstance(feature, Image):
                columns.append([_image_bytes(v, origin, int(r)) for v, r in zip(values, rows, strict=True)])
            else:
                columns.append([v.encode("utf-8", "surrogatepass") for v in values])
        for inputs in zip(*columns, strict=True):
            digest = hashlib.sha1(usedforsecurity=False)
            for value in inputs:
                digest.update(len(value).to_bytes(8, "little"))
                digest.update(value)
            ids.append(digest.hexdigest())
    return ids


def _image_bytes(value: dict | None, origin: Origin, row: int) -> bytes:
    """The encoded image of one row, decoded to see that all of it is there."""
    if value is None:
        raise origin.refusal(row, " has no image: remove it")
    try:
        encoded: bytes = value["bytes"] or Path(value["path"] or "").read_bytes()
        check(encoded)
    except (OSError, StreamError) as error:
        raise origin.refusal(row, f" holds no readable image ({error}): mend or remove it") from error
    return encoded


def fingerprint(task: Task) -> str:
    """sha256 over the ordered ids and labels of each split (of free texts, the responses): the same if and only if a
    run would see the same data."""
    digest = hashlib.sha256()
    for rows in _splits(task).values():
        digest.update(rows)
    return digest.hexdigest()


def split_fingerprints(task: Task) -> dict[str, str]:
    """The same of each split by itself, so that what is left of a task can be told when the rest is gone."""
    return {split: hashlib.sha256(rows).hexdigest() for split, rows in _splits(task).items()}


def _splits(task: Task) -> dict[str, bytes]:
    found = {}
    for split in ("train", "test", "validation"):
        data = getattr(task, split)
        if data is not None:
            kinds = data["response"][:] if "response" in data.column_names else data["label"][:]
            rows = "".join(f"{i} {kind}\n" for i, kind in zip(data["id"][:], kinds, strict=True))
            found[split] = f"{split} {len(data)}\n{rows}".encode()
    return found


def file_digest(paths: Iterable[Path]) -> str:
    """sha256 over the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
