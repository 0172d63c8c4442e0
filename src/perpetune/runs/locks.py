"""Locks of files on disk: held until they are released or their process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..core.errors import RunError
from ..core.files import writing

POLL = 0.5  # seconds: a run takes minutes, and a look at a network disk costs


def lock_file(file: Path, wait: bool = False) -> FileLock | None:
    """The lock of this file; None where another process holds it.

    Args:
        wait: until it is free.

    Raises:
        RunError: the file system has no locks.
    """
    lock = FileLock(file, thread_local=False)  # whichever thread is done with it releases it
    try:
        lock.acquire(blocking=wait, poll_interval=POLL)
    except Timeout:
        return None
    except OSError as error:
        if error.errno == errno.ENOLCK:
            raise RunError(
                f"{file.parent} lies on a disk that cannot lock files: give another directory (--out)"
            ) from error
        raise
    return lock


@contextlib.contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process has the claim to make the run at `path`, which several may want to make: while it has, no
    other gets it. The claim lies beside the run, which may not be there yet."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path.with_name(f".{path.name}.lock"), wait)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()
