"""Every error that perpetune raises on purpose: what is wrong, in one line, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PerpetuneError(Exception):
    """Base of all errors a user can mend. The command line prints it as one line, never a traceback."""


class ConfigError(PerpetuneError):
    """A configuration, an option or a recipe that cannot be used as it is written."""


class StreamError(PerpetuneError):
    """A stream or one of its tasks is missing, malformed, empty or contradicts itself."""


class ModelError(PerpetuneError):
    """A model cannot be loaded, or lacks what a recipe needs of it."""


class RuleError(PerpetuneError):
    """A rule finds nothing to act on, or its demands cannot be met."""


class HeadError(PerpetuneError):
    """A head cannot read this model or this stream, or no longer fits its checkpoint."""


class DeltaError(PerpetuneError):
    """A stored delta is damaged, of an unknown version, or belongs to another base model."""


class TrainingError(PerpetuneError):
    """Training cannot go on: a loss that is not finite, for instance."""


class RunError(PerpetuneError):
    """A run directory cannot be read, written or continued."""


class LostProcess(RunError):
    """Of several processes that train together, another one has ended; each that is left says so by itself."""


def first_line(error: BaseException) -> str:
    """What an error of others says, in one line; its kind, if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: object, known: Iterable[str], count: int = 3) -> str:
    """The known names nearest to `name`, as a phrase to end an error message with."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=count, cutoff=0.4)
    if close:
        return "did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    return "known are: " + ", ".join(known)
