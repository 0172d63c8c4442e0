"""Content hashes: of samples, so that duplicates are known wherever they appear; of tasks, so that a resumed run can
tell whether it still has the same data; of files, so that a changed file is never served from a cache."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from ..core.errors import StreamError
from .task import Task

_BATCH = 1024  # rows held in memory at a time


def sample_ids(data: Dataset, index: np.ndarray, place: str) -> list[str]:
    """sha1 of each chosen row's inputs, without its label: texts as UTF-8, images as they are encoded.

    Each input is preceded by its length, so that ("ab", "c") and ("a", "bc") differ. Equal inputs have equal ids even
    where their labels contradict each other, so that they stay together whenever data is divided by id.

    Args:
        data: the input columns, in order.
        index: (n,) rows of `data` to hash.
        place: where the rows come from, for messages.

    Raises:
        StreamError: an image is missing or cannot be opened.
    """
    arrow = data.with_format("arrow")
    ids = []
    for start in range(0, len(index), _BATCH):
        rows = index[start : start + _BATCH]
        columns = []
        for name, feature in data.features.items():
            values = arrow[rows].column(name).to_pylist()
            if isinstance(feature, Image):
                columns.append([_image_bytes(v, place, int(r)) for v, r in zip(values, rows, strict=True)])
            else:
                columns.append([v.encode("utf-8", "surrogatepass") for v in values])
        for inputs in zip(*columns, strict=True):
            digest = hashlib.sha1(usedforsecurity=False)
            for value in inputs:
                digest.update(len(value).to_bytes(8, "little"))
                digest.update(value)
            ids.append(digest.hexdigest())
    return ids


def _image_bytes(value: dict | None, place: str, row: int) -> bytes:
    """The encoded image of one row, opened (header only) to see that it is one."""
    if value is None:
        raise StreamError(f"row {row} of {place} has no image: remove it")
    try:
        encoded = value["bytes"] or Path(value["path"]).read_bytes()
        PILImage.open(io.BytesIO(encoded)).close()
    except (TypeError, OSError, UnidentifiedImageError, PILImage.DecompressionBombError) as error:
        raise StreamError(f"row {row} of {place} holds no readable image ({error}): mend or remove it") from error
    return encoded


def fingerprint(task: Task) -> str:
    """sha256 over the ordered ids and labels of each split: the same if and only if a run would see the same data."""
    digest = hashlib.sha256()
    for split in ("train", "test", "validation"):
        data = getattr(task, split)
        if data is not None:
            rows = "".join(f"{i} {label}\n" for i, label in zip(data["id"][:], data["label"][:], strict=True))
            digest.update(f"{split} {len(data)}\n{rows}".encode())
    return digest.hexdigest()


def file_digest(paths: Iterable[Path]) -> str:
    """sha256 over the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
