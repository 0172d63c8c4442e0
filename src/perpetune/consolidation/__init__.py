"""What a finished task leaves behind."""

from .base import Consolidation, Session
from .concatenate import Concatenate
from .continue_ import Continue
from .delta_merge import DeltaMerge, SparseSum
from .first_task import FirstTask
from .joint import Joint
from .merge import Merge
from .per_task import PerTask
from .replay import Replay
from .stack import Stack
from .states import PerTaskStates

CONSOLIDATIONS = {
    c.__name__: c
    for c in (Continue, Merge, Stack, DeltaMerge, SparseSum, PerTask, Concatenate, FirstTask, Replay, Joint)
}

__all__ = [
    "CONSOLIDATIONS",
    "Concatenate",
    "Consolidation",
    "Continue",
    "DeltaMerge",
    "FirstTask",
    "Joint",
    "Merge",
    "PerTask",
    "PerTaskStates",
    "Replay",
    "SparseSum",
    "Stack",
    "Session",
]
