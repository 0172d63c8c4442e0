"""Processes forked from a test, as `torchrun` would start them: what each of them has found, or the error that ended
it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 60.0  # seconds; the machine may be busy
WAITING = "is still waiting"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def there(file: Path) -> None:
    """Wait for a file that another process makes."""
    end = time.monotonic() + LIMIT
    while not file.exists():
        assert time.monotonic() < end, f"{file.name} is not there"
        time.sleep(0.01)


class Forked:
    """A process of a number, which does some work once it is one of `count` that are to meet at a port."""

    def __init__(self, work: Callable[[], Any], found: Path, number: int, port: int, count: int = 2) -> None:
        self.found = found
        told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
        self.pid = os.fork()
        if not self.pid:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(2 * LIMIT))  # whatever becomes of the test
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in told.items()}})
            answer: Any = None
            try:
                answer = work()
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            aside = found.with_suffix(".tmp")
            aside.write_text(json.dumps(answer), encoding="utf-8")
            os.replace(aside, found)
            os._exit(0)

    def answer(self, limit: float = LIMIT) -> Any:
        end = time.monotonic() + limit
        while not os.waitpid(self.pid, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return WAITING
            time.sleep(0.01)
        return json.loads(self.found.read_text(encoding="utf-8"))


def together(folder: Path, *work: Callable[[], Any]) -> list[Any]:
    """The answers of as many processes, which have met before each does its work."""
    from accelerate.state import AcceleratorState  # imported once, and not by each

    from perpetune.core import meeting

    def met(do: Callable[[], Any]) -> Callable[[], Any]:
        def both() -> Any:
            AcceleratorState._reset_state(reset_partial_state=True)  # of tests that trained alone before the fork
            meeting.TO_MEET = LIMIT / 60 / meeting.minutes()
            meeting.join("cpu")
            with meeting.all_there():
                return do()

        return both

    port = free_port()
    every = [Forked(met(do), folder / f"{i}.json", i, port, len(work)) for i, do in enumerate(work)]
    return [each.answer() for each in every]
