"""All tasks at once."""

from __future__ import annotations

from dataclasses import dataclass

import datasets

from ..streams.task import Stream
from .base import Step
from .continue_ import Continue


@dataclass
class Joint(Continue):
    """All tasks at once, as if nothing had to be kept apart: the upper bound that every comparison needs."""

    def schedule(self, stream: Stream) -> list[Step]:
        return [Step(0, "joint", stream.tasks, 0)]

    def rows(self, step: Step) -> datasets.Dataset:
        return datasets.concatenate_datasets([task.train for task in step.tasks])
