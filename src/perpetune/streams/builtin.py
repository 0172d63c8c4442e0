"""Streams that need no download: made of scikit-learn's handwritten digits (1797 images of 8x8), or written here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from . import support_weeks
from .sampling import generator, stratified


class Digits(NamedTuple):
    """images: (N, 8, 8) uint8, 0 is paper and 255 is ink; labels: (N,) the digits 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


def digits_halves(seed: int = 0) -> tuple[Digits, Digits]:
    """Two disjoint stratified halves of `sklearn.datasets.load_digits`, in the order of the source.

    The built-in streams are made from the second half at seed 0; the first is for pre-training, so that no image of a
    stream was ever seen. It shows the same ten digits, upright.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images.astype(np.uint16) * 255 // 16).astype(np.uint8)  # 0..16 -> 0..255
    first = np.zeros(len(images), dtype=bool)
    first[stratified(bunch.target, len(images) // 2, seed, "halves")] = True
    return Digits(images[first], bunch.target[first]), Digits(images[~first], bunch.target[~first])


def upright(seed: int, test_share: float) -> dict[str, Dataset]:
    """The second half as it is."""
    return {"train": _dataset(*digits_halves()[1])}


def transposed(seed: int, test_share: float) -> dict[str, Dataset]:
    """The second half, rows and columns of every image exchanged: familiar strokes in an unfamiliar world."""
    images, labels = digits_halves()[1]
    return {"train": _dataset(images.transpose(0, 2, 1), labels)}


SCENE, PIECE, PIECES = 16, 4, 3  # pixels of a scene's side and of a piece's, and pieces a scene


def scenes(images: np.ndarray, *key: object) -> np.ndarray:
    """(N, 8, 8) images -> (N, 16, 16) scenes: every image whole at a random place, before fainter pieces of others.

    Three pieces of 4 x 4 pixels lie behind it, cut anywhere out of `images`, at half their ink. `key`: what the draw
    depends on, as in `generator`.
    """
    draw, size = generator(*key, "scenes"), images.shape[-1]
    out = np.zeros((len(images), SCENE, SCENE), np.uint8)
    for image, scene in zip(images, out, strict=True):
        for _ in range(PIECES):
            (row, column), (top, left) = (
                draw.integers(size - PIECE + 1, size=2),
                draw.integers(SCENE - PIECE + 1, size=2),
            )
            piece = images[draw.integers(len(images)), row : row + PIECE, column : column + PIECE] // 2
            place = scene[top : top + PIECE, left : left + PIECE]
            np.maximum(place, piece, out=place)
        top, left = draw.integers(SCENE - size + 1, size=2)
        scene[top : top + size, left : left + size] = image
    return out


def clutter(seed: int, test_share: float) -> dict[str, Dataset]:
    """The second half transposed, every image in a scene of its own: a digit must be found before it is read."""
    images, labels = digits_halves()[1]
    return {"train": _dataset(scenes(images.transpose(0, 2, 1), seed), labels)}


def _noisy(images: np.ndarray, seed: int) -> np.ndarray:
    noise = generator(seed, "noise").integers(-96, 97, size=images.shape)
    return np.clip(images.astype(np.int64) + noise, 0, 255)


DRIFT: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "clean": lambda images, seed: images,
    "noisy": _noisy,
    "faint": lambda images, seed: images // 4 + 96,
    "inverted": lambda images, seed: 255 - images,
    "turned": lambda images, seed: np.rot90(images, axes=(1, 2)),
}


def drift(seed: int, test_share: float) -> dict[str, Dataset]:
    """The second half under each condition of `DRIFT`, named in the column `domain`.

    All conditions show the same training images and the same test images, so what differs between two tasks is the
    condition alone, and no test image is trained on under another condition.
    """
    images, labels = digits_halves()[1]
    test = np.zeros(len(images), dtype=bool)
    test[stratified(labels, round(test_share * len(images)), seed, "test")] = True
    conditions = np.repeat(np.arange(len(DRIFT)), len(images))
    views = np.concatenate([view(images, seed) for view in DRIFT.values()])
    labels, test = np.tile(labels, len(DRIFT)), np.tile(test, len(DRIFT))
    return {
        split: _dataset(views[rows], labels[rows], conditions[rows])
        for split, rows in (("train", ~test), ("test", test))
    }


def _dataset(images: np.ndarray, labels: np.ndarray, conditions: np.ndarray | None = None) -> Dataset:
    """Images are stored as binary PGM: unlike PNG the same bytes, and so the same ids, with any version of a codec."""
    header = b"P5\n%d %d\n255\n" % images.shape[:0:-1]
    pixels = np.ascontiguousarray(images, dtype=np.uint8)
    columns: dict[str, list] = {
        "image": [{"bytes": header + image.tobytes(), "path": None} for image in pixels],
        "label": labels.tolist(),
    }
    features: dict[str, object] = {"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])}
    if conditions is not None:
        columns["domain"] = conditions.tolist()
        features["domain"] = ClassLabel(names=list(DRIFT))
    return Dataset.from_dict(columns, features=Features(features))


class Builtin(NamedTuple):
    """splits: (seed, test_share) -> the dataset's splits; metrics: of tasks of free texts, by name; the rest as in
    `load_stream`."""

    splits: Callable[[int, float], dict[str, Dataset]]
    split_by: str
    classes_per_task: int | None
    about: str
    metrics: Mapping[str, str] = MappingProxyType({})


BUILTINS: dict[str, Builtin] = {
    "digits": Builtin(upright, "class", 2, "handwritten digits 0 to 9, two new ones a task"),
    "digits-transposed": Builtin(transposed, "class", 2, "the same, rows and columns exchanged"),
    "digits-clutter": Builtin(clutter, "class", 2, "the transposed ones, each at a random place in clutter"),
    "digits-drift": Builtin(
        drift, "domain", None, "all ten digits under one new condition a task: " + ", ".join(DRIFT)
    ),
    "support-weeks": Builtin(
        support_weeks.weeks,
        "week",
        None,
        "conversations for language models: four weeks of a made-up support desk, of facts, words and formats",
        MappingProxyType(support_weeks.METRICS),
    ),
}
