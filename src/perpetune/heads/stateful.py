"""What every head shares: it is opened for a width and label texts, checks what it is given, and knows its files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import HeadError
from .base import Head


class OpenedHead(Head):
    """A head that remembers the width and the label texts that it was opened with.

    A class *is* its label text: a saved head carries the label texts of the classes that it has seen, so that it can be
    read by a run whose stream has grown, lists its labels in another order, or lacks others; never by one that lacks a
    class that the head knows.
    """

    unwritten: ClassVar[dict[str, Any]] = {}  # settings that came later, and what was so before: left out where it is

    def __init__(self) -> None:
        super().__init__()
        self.width = 0
        self.labels: tuple[str, ...] = ()
        self.seed = 0

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, by name: `type(head)(**head.config())` is the same head, unopened."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {k: v for k, v in values.items() if k not in self.unwritten or v != self.unwritten[k]}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        """See `Head.open`.

        Raises:
            HeadError: no features, no labels, or a label text that stands twice.
        """
        if width < 1:
            raise HeadError(f"head `{self.name}`: features of width {width}; a head needs at least one feature")
        if not labels:
            raise HeadError(f"head `{self.name}`: no labels; a head needs at least one class")
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise HeadError(f"head `{self.name}`: label text `{twice[0]}` stands twice; make label texts unique")
        self.width, self.labels, self.seed = width, tuple(labels), seed

    # What is given

    def checked_classes(self, classes: Sequence[int]) -> list[int]:
        """The classes as plain ints, at least one, each once, each a class of the stream."""
        self._check_open()
        found = [int(c) for c in classes]
        wrong = [c for c in found if not 0 <= c < len(self.labels)]
        if wrong:
            raise HeadError(f"head `{self.name}`: class {wrong[0]} is not one of the {len(self.labels)} of this stream")
        if not found or len(set(found)) < len(found):
            raise HeadError(f"head `{self.name}`: a task needs classes, each once; found {found}")
        return found

    def check_features(self, features: Tensor) -> None:
        self._check_open()
        if features.ndim != 2 or features.shape[1] != self.width:
            raise HeadError(
                f"head `{self.name}`: expected features of shape (N, {self.width}), found {tuple(features.shape)}"
            )

    def _check_open(self) -> None:
        if not self.labels:
            raise HeadError(f"head `{self.name}` is not open yet: call `open(width, labels, seed=...)` first")

    # What is saved

    @property
    def kept_width(self) -> int:
        """The width of the features, where a saved head depends on it."""
        return self.width

    def header(self, classes: Tensor) -> dict[str, Tensor]:
        """Width, and the label texts of the classes that are saved (k,), as tensors: what `columns` checks."""
        self._check_open()
        text = json.dumps([self.labels[c] for c in classes.tolist()], ensure_ascii=False).encode()
        return {"labels": torch.tensor(list(text), dtype=torch.uint8), "width": torch.tensor(self.kept_width)}

    def columns(self, state: dict[str, Tensor]) -> Tensor:
        """For each class of a saved head its index among our classes, (C_saved,).

        Raises:
            HeadError: the saved head has another width, or knows classes that this stream lacks.
        """
        self._check_open()
        width = int(self.take(state, "width", ()))
        if width != self.kept_width:
            raise HeadError(
                f"head `{self.name}` no longer fits its checkpoint: expected features of width {self.kept_width}, "
                f"found {width}; use the model that the checkpoint was made with, or a new run directory"
            )
        try:
            saved = json.loads(bytes(self.take(state, "labels", None).tolist()).decode())
        except ValueError as error:
            raise HeadError(f"head `{self.name}`: the checkpoint's label texts cannot be read ({error})") from None
        index = {label: c for c, label in enumerate(self.labels)}
        missing = [label for label in saved if label not in index]
        if missing:
            raise HeadError(
                f"head `{self.name}` no longer fits its checkpoint: it knows {len(saved)} classes, this stream has "
                f"{len(self.labels)} and lacks `{missing[0]}`; keep the finished tasks in the stream"
            )
        return torch.tensor([index[label] for label in saved], dtype=torch.long)

    def take(self, state: dict[str, Tensor], name: str, shape: tuple[int, ...] | None) -> Tensor:
        """The tensor `name` of a saved head, of the shape that is expected (None: of any).

        Raises:
            HeadError: it is missing, or has another shape.
        """
        if name not in state:
            held = ", ".join(sorted(state)) or "nothing"
            raise HeadError(f"head `{self.name}` no longer fits its checkpoint: expected `{name}`, found {held}")
        found = tuple(state[name].shape)
        if shape is not None and found != shape:
            raise HeadError(
                f"head `{self.name}` no longer fits its checkpoint: expected `{name}` of shape {shape}, found {found}"
            )
        return state[name].detach().cpu()
