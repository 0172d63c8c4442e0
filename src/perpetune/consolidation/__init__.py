"""What a finished task leaves behind."""

from .base import Consolidation, Step
from .continue_ import Continue
from .delta_merge import DeltaMerge, SparseSum
from .joint import Joint
from .merge import Merge
from .per_task import PerTask
from .replay import Replay
from .stack import Stack

CONSOLIDATIONS = {c.__name__: c for c in (Continue, Merge, Stack, DeltaMerge, SparseSum, PerTask, Replay, Joint)}

__all__ = [
    "CONSOLIDATIONS",
    "Consolidation",
    "Continue",
    "DeltaMerge",
    "Joint",
    "Merge",
    "PerTask",
    "Replay",
    "SparseSum",
    "Stack",
    "Step",
]
