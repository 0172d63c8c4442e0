"""Streams: the tasks, in the order in which they arrive."""

from .content import fingerprint
from .digits import BUILTINS, Digits, digits_halves
from .load import load_stream
from .task import Scenario, Stream, Task

__all__ = ["BUILTINS", "Digits", "Scenario", "Stream", "Task", "digits_halves", "fingerprint", "load_stream"]
