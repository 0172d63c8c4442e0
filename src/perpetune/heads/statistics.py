"""Heads that do not train: sums over samples, exact in any order, which can be added, subtracted and saved."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import HeadError
from .base import Head
from .exact_sums import WIDEST
from .linear import LinearHead
from .stateful import OpenedHead

KEPT = 2048  # features: the places of a triangle, kept for matrices up to this size, take 32 MB
Shape = tuple[torch.dtype, tuple[int, ...]]


class ObservingHead(OpenedHead):
    """A head that does not train: it gathers what it knows of samples with `observe`; a linear head shapes the features
    where it stands first."""

    trains = False

    def trainer(self) -> Head:
        return LinearHead(loss="current")

    def begin_task(self, classes: Sequence[int]) -> None:
        self.checked_classes(classes)

    def end_task(self) -> None:
        self._check_open()

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        raise HeadError(f"head `{self.name}` has no loss: train with the head that its `trainer()` gives")


class StatisticsHead(ObservingHead):
    """A head made of sums over samples, `self.statistics`, in fixed point (see `moments`), on the CPU.

    Subclasses say what the sums are (`shapes`), which axis runs over classes (`Head.class_axis`), and which are
    symmetric matrices (`symmetric`: only the upper triangle is saved).
    """

    symmetric: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, refresh: bool = False) -> None:
        super().__init__()
        self.refresh = refresh
        if refresh:
            self.name = f"{self.name}_refresh"

    def shapes(self, classes: int) -> dict[str, Shape]:
        raise NotImplementedError

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        super().open(width, labels, seed=seed)
        if width > WIDEST:
            raise HeadError(f"head `{self.name}`: features of width {width}; exact sums allow {WIDEST}")
        self.clear()

    @staticmethod
    def kind_of(name: str) -> str:
        """What a sum is: its name without the prefix of a map."""
        return name.rpartition(".")[2]

    def clear(self) -> None:
        """As if nothing had been observed."""
        self.statistics = self._zeros()
        self.changed()

    def _zeros(self) -> dict[str, Tensor]:
        shapes = self.shapes(len(self.labels))
        return {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}

    def changed(self) -> None:
        """Forget whatever was computed from the statistics."""

    def class_counts(self) -> Tensor:
        """n_c, (C,) int64."""
        self._check_open()
        return self.statistics["counts"].reshape(-1, len(self.labels)).sum(0)

    def knows(self, classes: Sequence[int]) -> bool:
        return bool((self.class_counts()[self.checked_classes(classes)] > 0).all())

    def checked_samples(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (N x width, fp64) and labels (N,) on the CPU.

        Raises:
            HeadError: shapes that do not match, features that are not finite, a label that is no class.
        """
        features, labels = self.checked_queries(features), labels.detach().cpu().long()
        if not len(features) == labels.numel() == len(ids):
            raise HeadError(
                f"head `{self.name}`: {len(features)} features, {labels.numel()} labels and {len(ids)} ids; "
                "each sample needs one of each"
            )
        self.checked_classes(labels.unique().tolist() or [0])
        return features, labels.reshape(-1)

    def checked_queries(self, features: Tensor) -> Tensor:
        self.check_features(features)
        features = features.detach().cpu().to(torch.float64)
        if not torch.isfinite(features).all():
            raise HeadError(f"head `{self.name}`: features are not finite; the model gives NaN or infinity")
        return features

    def clipped_share(self) -> float:
        clipped, entries = self.statistics["clipped"].tolist()
        return clipped / max(entries, 1)

    # Saving, and arithmetic of whole heads

    def state(self) -> dict[str, Tensor]:
        seen = self.class_counts().nonzero().flatten()
        state = self.header(seen)
        for name, tensor in self.statistics.items():
            if self.kind_of(name) in self.symmetric:
                state[name] = tensor[..., _upper(tensor.shape[-1])]
            elif self.kind_of(name) in self.class_axis:
                state[name] = tensor.index_select(self.class_axis[self.kind_of(name)], seen)
            else:
                state[name] = tensor.clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.statistics = self._read(state)
        self.changed()

    def add(self, state: dict[str, Tensor]) -> None:
        """Add what another head of the same kind has seen (a shard, another run), exactly.

        Raises:
            HeadError: the state is not one of this head, or the sums would no longer be exact.
        """
        other = self._read(state)
        self.check_samples(int(self.class_counts().sum() + other["counts"].sum()))
        self.statistics = {name: tensor + other[name] for name, tensor in self.statistics.items()}
        self.changed()

    def subtract(self, state: dict[str, Tensor]) -> None:
        """Take samples out: afterwards the head is, to the bit, one that never saw them.

        `state` is that of a head which saw nothing but these samples.

        Raises:
            HeadError: the state is not one of this head, or holds samples that this head has not seen.
        """
        self._take_out(self._read(state))

    def forget(self, task: int, classes: Sequence[int], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """See `Head.forget`: the task's own sums are the difference of the two states, exactly."""
        past = self._read(before) if before else self._zeros()
        self._take_out({name: tensor - past[name] for name, tensor in self._read(after).items()})

    def _take_out(self, other: dict[str, Tensor]) -> None:
        if (self.statistics["counts"] < other["counts"]).any():
            raise HeadError(f"head `{self.name}`: cannot subtract samples that it has not seen")
        self.statistics = {name: tensor - other[name] for name, tensor in self.statistics.items()}
        self.changed()

    def check_samples(self, samples: int) -> None:
        """Raise HeadError where sums over so many samples could not be exact."""
        raise NotImplementedError

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Raise HeadError where a state is not one of this head: names, shapes, classes, settings."""
        self._stored(state)

    def _stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The statistics of a state as they are stored: of the classes that it has seen, and triangles flat."""
        flat = {}
        for name, (dtype, shape) in self.shapes(len(self.columns(state))).items():
            if self.kind_of(name) in self.symmetric:
                shape = (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2)
            flat[name] = self.take(state, name, shape).to(dtype)
        return flat

    def _read(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The statistics of a state, laid out for our classes: those that the state lacks have seen nothing."""
        stored, columns, ours = self._stored(state), self.columns(state), self.shapes(len(self.labels))
        read = {}
        for name, tensor in stored.items():
            dtype, shape = ours[name]
            if self.kind_of(name) in self.symmetric:
                read[name] = symmetric(tensor, shape[-1])
            elif self.kind_of(name) in self.class_axis:
                axis = self.class_axis[self.kind_of(name)]
                read[name] = torch.zeros(shape, dtype=dtype).index_copy(axis, columns, tensor)
            else:
                read[name] = tensor.clone()
        return read


def symmetric(flat: Tensor, m: int) -> Tensor:
    """Symmetric matrices (... x m x m) of which the upper triangles are given, row after row (... x m (m + 1) / 2)."""
    places = _kept_places(m) if m <= KEPT else _places(m)
    return flat.index_select(-1, places).reshape(*flat.shape[:-1], m, m)


def _places(m: int) -> Tensor:
    """Where each entry of a symmetric matrix stands in its upper triangle, (m^2,)."""
    i = torch.arange(m)
    low, high = torch.minimum(i, i[:, None]), torch.maximum(i, i[:, None])
    return (low * m - low * (low - 1) // 2 + high - low).flatten()


_kept_places = functools.lru_cache(maxsize=2)(_places)


def _upper(m: int) -> Tensor:
    return torch.ones(m, m, dtype=torch.bool).triu()
