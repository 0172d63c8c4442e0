"""Paths as users give them; what an operating system says where nothing can be. Imports nothing heavy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import ConfigError, first_line

LONGEST = 200  # letters of a path, in a message
# what an operating system says of a path alone: whatever it was given for, another one helps
OF_THE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)


def local_path(given: str | os.PathLike[str]) -> Path:
    """A path as a user gives it, with `~` for the home folder; whether something is there is not asked.

    Raises:
        ConfigError: nothing can be there: its name is too long or holds a NUL character, its links go round in a
            circle, its folder may not be looked into, or nobody has that home.
    """
    try:
        path = Path(given).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
            return path
        raise ConfigError(no_path(given, error)) from error
    return path


def no_path(given: str | bytes | os.PathLike[str], error: BaseException) -> str:
    """What to say of a path that cannot be used; of a very long one both ends."""
    name, why = os.fsdecode(given), getattr(error, "strerror", None) or first_line(error)
    short = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}...{name[-LONGEST // 2 :]}"
    return f"{short!r} cannot be used ({why}): give another path"
