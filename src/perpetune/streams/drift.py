"""Streams without task boundaries: the training examples of a stream's tasks, fed in order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby

import datasets
import numpy as np

from ..core.errors import ConfigError, StreamError
from .sampling import generator
from .task import Stream


@dataclass(frozen=True, eq=False)
class Drift:
    """Examples in the order in which they arrive; nobody says when the task changes.

    Attributes:
        rows: N examples with the columns of `Task.train`.
        truth: (N,) the place in `stream.tasks` of the task of each row; for evaluation only.
        stream: where they are from, with the test sets.
        settings: the arguments of `drift`.
    """

    rows: datasets.Dataset
    truth: np.ndarray
    stream: Stream
    settings: dict

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """What nobody says: (start, stop, place of the task in `stream.tasks`) of every segment."""
        lengths = [(int(task), len(list(rows))) for task, rows in groupby(self.truth)]
        stops = accumulate(count for _, count in lengths)
        return [(stop - count, stop, task) for (task, count), stop in zip(lengths, stops, strict=True)]


def drift(stream: Stream, segments: int = 12, length: tuple[int, int] = (150, 400), *, seed: int = 0) -> Drift:
    """Tasks in random order with repeats: every task at least once, none twice in a row.

    A segment has between length[0] and length[1] examples of its task, in random order; a task that comes back brings
    others than before, so that it comes no more once it has fewer than length[0] left.

    Raises:
        ConfigError: fewer segments than tasks, an impossible length, or training settings of single tasks.
        StreamError: the tasks have too few examples for so many segments.
    """
    least, most = length
    if not 1 <= least <= most:
        raise ConfigError(f"drift: length={tuple(length)}; give the least and the greatest, (150, 400)")
    if len(stream) < 2 or segments < len(stream):
        raise ConfigError(
            f"drift: segments={segments} of {len(stream)} tasks; it takes two tasks, and a segment for every task"
        )
    own = [task.name for task in stream if task.training]
    if own:
        raise ConfigError(f"drift: nobody says which examples are of task `{own[0]}`: leave its training settings out")
    draw = generator(seed, "drift")
    left = [draw.permutation(len(task.train)) for task in stream]
    parts: list[datasets.Dataset] = []
    truth: list[int] = []
    last, new = -1, set(range(len(stream)))
    for remaining in range(segments, 0, -1):
        allowed = new if remaining == len(new) else range(len(stream))
        able = [t for t in sorted(allowed) if t != last and len(left[t]) >= least]
        if not able:
            raise StreamError(
                f"drift: the tasks of `{stream.name}` have too few training examples for {segments} segments of "
                f"{least} and more: ask for fewer or shorter ones, or raise train_limit"
            )
        last = able[int(draw.integers(len(able)))]
        new.discard(last)
        count = int(draw.integers(least, min(most, len(left[last])) + 1))
        parts.append(stream.tasks[last].train.select(left[last][:count]))
        truth += [last] * count
        left[last] = left[last][count:]
    settings = {"segments": segments, "length": [least, most], "seed": seed}
    rows = datasets.concatenate_datasets(parts).select_columns(parts[0].column_names)
    return Drift(rows, np.array(truth), stream, settings)
