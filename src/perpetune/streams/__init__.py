"""Streams: the tasks, in the order in which they arrive."""

from .again import load_again
from .builtin import BUILTINS, Digits, digits_halves, scenes
from .drift import Drift, drift
from .hashing import fingerprint, split_fingerprints
from .load import load_stream
from .prompting import pose
from .task import Modality, Scenario, Stream, Task

__all__ = [
    "BUILTINS",
    "Digits",
    "Drift",
    "Modality",
    "Scenario",
    "Stream",
    "Task",
    "digits_halves",
    "scenes",
    "drift",
    "fingerprint",
    "load_again",
    "load_stream",
    "pose",
    "split_fingerprints",
]
