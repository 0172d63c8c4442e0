"""What a finished task leaves behind."""

from .base import Consolidation, Step
from .continue_ import Continue
from .data import Joint, Replay
from .merge import Merge
from .sparse_sum import SparseSum
from .stack import Stack

CONSOLIDATIONS = {c.__name__: c for c in (Continue, Merge, Stack, SparseSum, Replay, Joint)}

__all__ = ["CONSOLIDATIONS", "Consolidation", "Continue", "Joint", "Merge", "Replay", "SparseSum", "Stack", "Step"]
