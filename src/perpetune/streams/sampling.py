"""Seeded, stratified choices of rows: caps, and shares that are split off."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def quotas(sizes: np.ndarray, count: int, *, least: int = 0, spare: int = 0) -> np.ndarray:
    """How many rows to take of each class so that the shares stay those of the whole.

    Proportional shares q_c = count n_c / sum(n), rounded down, the rest given by largest remainder (ties: the first
    class), within least <= q_c <= n_c - spare.

    Args:
        sizes: (C,) rows n_c there are of each class.
        count: rows to take in all; bent where the bounds leave no room for it.
        least: take at least so many of every class (or all that may be taken of it).
        spare: leave at least so many of every class.

    Returns:
        (C,) rows to take of each class.
    """
    most = np.maximum(sizes - spare, 0)
    floor = np.minimum(least, most)
    count = int(np.clip(count, floor.sum(), most.sum()))
    exact = sizes * (count / max(int(sizes.sum()), 1))
    taken = np.clip(np.floor(exact).astype(np.int64), floor, most)
    while taken.sum() < count:
        taken[np.where(taken < most, exact - taken, -np.inf).argmax()] += 1
    while taken.sum() > count:
        taken[np.where(taken > floor, taken - exact, -np.inf).argmax()] -= 1
    return taken


def generator(*key: object) -> np.random.Generator:
    """A random generator that depends on `key` alone, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def shuffled(items: Sequence[T], order_seed: int) -> list[T]:
    """The items in an order that depends on `order_seed` and their number alone."""
    return [items[i] for i in generator(order_seed, "order").permutation(len(items))]


def stratified(strata: np.ndarray, count: int, *key: object, least: int = 0, spare: int = 0) -> np.ndarray:
    """Positions of about `count` rows, ascending, drawn class by class (see `quotas`).

    The draw within a class depends on `key`, the class and its number of rows alone: neither on the other classes nor
    on how many rows are drawn (a smaller draw of a class is part of a larger one).

    Args:
        strata: (N,) the class of each row, as text.
    """
    names, inverse = np.unique(strata.astype(str), return_inverse=True)
    takes = quotas(np.bincount(inverse, minlength=len(names)), count, least=least, spare=spare)
    chosen = [
        generator(*key, name).permutation(np.flatnonzero(inverse == c))[:take]
        for c, (name, take) in enumerate(zip(names, takes, strict=True))
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
