"""What a finished task leaves behind."""

from .base import Consolidation, Step
from .continue_ import Continue
from .data import Joint, Replay
from .merge import Merge
from .per_task import PerTask
from .sparse_sum import SparseSum
from .stack import Stack

CONSOLIDATIONS = {c.__name__: c for c in (Continue, Merge, Stack, SparseSum, PerTask, Replay, Joint)}

__all__ = [
    "CONSOLIDATIONS",
    "Consolidation",
    "Continue",
    "Joint",
    "Merge",
    "PerTask",
    "Replay",
    "SparseSum",
    "Stack",
    "Step",
]
