"""What a finished task leaves behind."""

from .base import Consolidation, Session
from .concatenate import Concatenate
from .continue_ import Continue
from .delta_merge import DeltaMerge, SparseSum
from .factor_merge import FactorMerge
from .first_task import FirstTask
from .joint import Joint
from .merge import Merge
from .per_task import PerTask
from .projected_merge import ProjectedMerge
from .replay import Replay
from .shared_branch import SharedBranch
from .stack import Stack
from .states import PerTaskStates
from .weighed import WeighedPerTask

CONSOLIDATIONS = {
    c.__name__: c
    for c in (
        Continue,
        Merge,
        Stack,
        DeltaMerge,
        SparseSum,
        FactorMerge,
        ProjectedMerge,
        PerTask,
        WeighedPerTask,
        SharedBranch,
        Concatenate,
        FirstTask,
        Replay,
        Joint,
    )
}

__all__ = [
    "CONSOLIDATIONS",
    "Concatenate",
    "Consolidation",
    "Continue",
    "DeltaMerge",
    "FactorMerge",
    "FirstTask",
    "Joint",
    "Merge",
    "PerTask",
    "PerTaskStates",
    "ProjectedMerge",
    "Replay",
    "SharedBranch",
    "SparseSum",
    "Stack",
    "Session",
    "WeighedPerTask",
]
