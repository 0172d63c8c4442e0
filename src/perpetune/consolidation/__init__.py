"""What a finished task leaves behind."""

from .base import Consolidation, Step
from .continue_ import Continue
from .data import Joint, Replay
from .merge import Merge
from .stack import Stack

CONSOLIDATIONS = {c.__name__: c for c in (Continue, Merge, Stack, Replay, Joint)}

__all__ = ["CONSOLIDATIONS", "Consolidation", "Continue", "Joint", "Merge", "Replay", "Stack", "Step"]
