"""The head slot: how a prediction is read off the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.measurement import Measurement
from ..models.backbone import Reads
from .readout import Readout


class Head(nn.Module):
    """How a prediction is read off pooled features f in R^{N x L}.

    A head that *trains* shapes the features through its `loss`. A head that does not (`trains = False`) only gathers
    statistics with `observe`; where such a head stands first in a recipe, the features are shaped by `trainer()`.
    Classes are global indices, rows of `Stream.labels`; scores have one column per class of the stream.

    Life of a head: `open(...)` once per run, then per task `begin_task`, (training through `loss`), `end_task`,
    `observe` over the task's training samples in eval mode (with `refresh`: `clear`, then those of all tasks so far),
    then any number of `scores`. A finished task is saved with `state()`; a resumed run calls `open` and `load_state`.
    A task is taken out again with `forget`. What is saved names only classes that were seen and not forgotten, so that
    the others may leave the stream.

    Attributes:
        reads: what of a model it reads, see `Backbone.offers`: pooled "features", a language model's "answers", or
            "pairs" of an image and a text.
        blocks: whether it reads the features under the adapters of all tasks side by side (`Concatenate`).
    """

    name: str = ""
    trains: bool = False
    needs_label_embeddings: bool = False
    follows_texts: bool = False  # reads label texts under the model as it is now, see `embed`
    refresh: bool = False  # statistics are gathered anew from all tasks, after every task
    carries: bool = False  # statistics of earlier tasks are carried along when the model changes, see `carry`
    reads: Reads = "features"
    blocks: bool = False
    weighs: bool = False  # whether its loss may weigh classes, see `weigh`
    # Of the saved state: parts with a row for every class in `labels`, and the axis of the rows; the beginning of the
    # names of parts that one finished task alone has. A commit holds of these what is new (`heads.increments`).
    class_axis: ClassVar[Mapping[str, int]] = {}
    task_parts: ClassVar[str] = ""
    starts_from_own: bool = False  # takes rows from the own head of a fine-tuned classifier, see `start_from`

    @property
    def observes(self) -> bool:
        """Whether it gathers statistics of training samples."""
        return type(self).observe is not Head.observe

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        """Start from nothing: features have `width` columns, `labels` are the label texts of all classes, C of them.

        `label_embeddings` (C x width): features of the label texts under the untouched model; given only to a head that
        asks for them with `needs_label_embeddings`.
        """
        raise NotImplementedError

    def embed(self, classes: Sequence[int], label_embeddings: Tensor) -> None:
        """Features of the label texts of some classes (k x width) under the model as it is now.

        Asked of heads with `follows_texts` alone, before they are read, whenever the model has changed.

        Raises:
            HeadError: they are of another shape, or not finite.
        """
        raise NotImplementedError

    def start_from(self, weight: Tensor, bias: Tensor, labels: Sequence[str]) -> None:
        """Take over rows (weight: C' x L, bias: C') for classes of the same label texts; once, after `open`.

        Asked of heads with `starts_from_own` alone.

        Raises:
            HeadError: there are none.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        raise NotImplementedError

    def label_prompts(self, labels: Sequence[str]) -> list[str]:
        """The texts whose embeddings `open` is given as `label_embeddings`."""
        return list(labels)

    def trainer(self) -> Head:
        """The head whose loss shapes the features when this head comes first: itself if it trains."""
        raise NotImplementedError

    def reopen(self, task: int) -> None:
        """The coming task goes on with what the head keeps of a finished one alone, if it does. Before `begin_task`."""

    def begin_task(self, classes: Sequence[int]) -> None:
        """Classes of the coming task. Trainable parameters, if any, exist from here on until `end_task`."""
        raise NotImplementedError

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Scalar training loss; features (N x width), labels (N,) global class indices."""
        raise NotImplementedError

    def weigh(self, weights: Tensor) -> None:
        """Weights of all classes (C,) in the loss of the task that has begun, of heads with `weighs`."""
        raise NotImplementedError

    def end_task(self) -> None:
        """Training of the current task is over: parameters become plain state."""

    def observe(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        """Add samples to the statistics: order and batching do not matter. `ids` are the samples' content hashes."""

    def carry(self, before: Tensor, after: Tensor) -> None:
        """Features of the same samples (N x width) before and after the model changed: those of the task to come.

        Asked of heads with `carries` alone, after training and before the task is observed.
        """
        raise NotImplementedError

    def clear(self) -> None:
        """As if no sample had been observed."""

    def forget(self, task: int, classes: Sequence[int], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """As if a finished task had never been.

        A head of sums takes out what lies between the two states, and has the bits of one that never saw the samples
        (with the features that they had). A head that trains forgets the rows of `classes` and what it keeps of the
        task alone; rows of classes that other tasks have too stay as all of them made them. A head with `refresh` is
        not asked: it is cleared, and shown the samples of the tasks that remain.

        Args:
            task: index of the task, as for `scores`; those after it move up.
            classes: those that no other task has.
            before, after: `state()` when the task began (empty: nothing was saved yet) and when it was finished.

        Raises:
            HeadError: a state is not one of this head, or holds what this head has not seen.
        """
        raise NotImplementedError

    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        """(N x C) scores, -inf for classes not seen yet.

        `task`: 0-based index of the task where it is given, for heads that keep something of their own for every task;
        the caller still restricts the columns to the task's classes.
        """
        raise NotImplementedError

    def readout(self, classes: Sequence[int], task: int | None = None) -> Readout | None:
        """The scores of these classes as one linear map of the features; None where they are not one.

        Args:
            task: see `scores`.
        """
        return None

    def knows(self, classes: Sequence[int]) -> bool:
        """Whether the head could name all of these classes now (a label-text head knows all from the start)."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors."""
        raise NotImplementedError

    @property
    def finished(self) -> int:
        """Of how many finished tasks the state has `task_parts`."""
        return 0

    def recent_state(self, task: int) -> dict[str, Tensor]:
        """`state` without the parts of the first finished tasks, so many of them."""
        return self.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`, after `open`.

        The stream may have grown since: `open` was given more labels than when the state was saved, in the same order
        or not. What is saved by class is put where the class is now; `OpenedHead.header` and `columns` do that by the
        label texts.

        Raises:
            HeadError: the state is not one of this head (names, shapes), with what was expected and what was found.
        """
        raise NotImplementedError

    def guarantee(self) -> list[Measurement]:
        return []


def matmul_dtype(device: torch.device) -> torch.dtype:
    """fp64 where the device has it: products of fixed-point numbers are exact there."""
    return torch.float32 if device.type == "mps" else torch.float64
