"""All tasks at once."""

from __future__ import annotations

from dataclasses import dataclass

import datasets

from ..streams.task import Stream
from .base import Session
from .continue_ import Continue


@dataclass
class Joint(Continue):
    """All tasks at once, as if nothing had to be kept apart: the upper bound that every comparison needs."""

    def schedule(self, stream: Stream) -> list[Session]:
        return [Session(0, "joint", stream.tasks, 0)]

    def rows(self, session: Session) -> datasets.Dataset:
        return datasets.concatenate_datasets([task.train for task in session.tasks])
