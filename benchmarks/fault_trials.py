"""Processes that die, disks that fill up, clocks that jump: runs of a micro model in forked processes, for `faults`."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

TASKS = 3
LIMIT = 900.0  # seconds for a command: the machine may be busy
TELLING, STACK = 0.5, 3000  # seconds to tell where it is, and how many letters of that are told on
WRITING = {"os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}


class Child:
    """A forked process that runs a command of perpetune."""

    def __init__(self, pid: int, said: Path) -> None:
        self.pid, self._said = pid, said
        self.code: int | None = None

    def wait(self, limit: float = LIMIT) -> int:
        """Its exit code, the negative number of a signal that ended it; past the limit it tells where it is, and is
        killed."""
        end = time.monotonic() + limit
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                if limit == LIMIT:
                    self.signal(signal.SIGUSR1)
                    time.sleep(TELLING)
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = -signal.SIGKILL
                raise TimeoutError(f"still running after {limit:.0f} s: {self.said[-STACK:]}")
            else:
                time.sleep(0.002)
        return self.code

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        return self._said.read_text(encoding="utf-8", errors="replace")

    def told(self) -> str:
        """What is wrong with how it told of its end: nothing, where all went well, or one line says why not."""
        if self.code == 0:
            return ""
        lines = [line for line in self.said.splitlines() if line.startswith("perpetune: ")]
        lines = [line for line in lines if not line.startswith("perpetune: warning")]
        if "Traceback" in self.said:
            return f"a traceback: {self.said.strip().splitlines()[-1]}"
        if self.code != 2 or len(lines) != 1:
            return f"exit code {self.code} and {len(lines)} lines: {self.said[-300:]}"
        return f"nobody foresaw it: {lines[0]}" if "unforeseen" in lines[0] else ""


class Trials:
    """A micro model, a stream of three small tasks, and commands on them in processes forked from this one.

    This process imports torch and all that a run needs, and computes nothing: so a fork is whole.

    Args:
        folder: for everything.
    """

    def __init__(self, folder: Path) -> None:
        from .many_tasks import TRAINING, make_model, make_stream

        own_bars()
        os.environ["PERPETUNE_CACHE"] = str(folder / "cache")
        self.folder, self._number = folder, 0
        self.model, self.stream = make_model(folder / "model"), make_stream(folder / "stream", TASKS)
        self.training = TRAINING
        self._import_all()

    def _import_all(self) -> None:
        """Import what a run imports, as a first run tells."""
        names = self.folder / "modules.json"

        def ended(code: int) -> None:
            names.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")

        first = self.start(self.command(self.folder / "first"), after=ended)
        if first.wait():
            raise RuntimeError(first.said)
        for name in json.loads(names.read_text(encoding="utf-8")):
            if name not in sys.modules and name != "__mp_main__":
                try:
                    importlib.import_module(name)
                except Exception:  # made by another module when it runs, as torch.ops is
                    continue

    def command(self, out: Path, *more: str, ranks: int = 1) -> list[str]:
        """`perpetune run`; with `ranks` processes they have the batch of one together."""
        settings = {
            **self.training,
            "per_device_train_batch_size": self.training["per_device_train_batch_size"] // ranks,
        }
        sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        given = ["--model", str(self.model), "--stream", str(self.stream), "--scenario", "class"]
        return ["run", *given, "--recipe", "lora", "--out", str(out), *sets, *more]

    def start(
        self,
        arguments: Sequence[str],
        before: Callable[[], object] = lambda: None,
        after: Callable[[int], object] = lambda code: None,
        environment: dict[str, str] | None = None,
    ) -> Child:
        """Run a command of perpetune.

        Args:
            before: what the process does first; after: and last, with the exit code, if it lives so long.
        """
        self._number += 1
        said = self.folder / "said" / f"{self._number}.txt"
        said.parent.mkdir(exist_ok=True)
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            os.environ.update(environment or {})
            _child(arguments, writing, before, after)
        os.close(writing)
        # a pipe, since a limit on the size of files would cut a file short; a process of its own empties it
        reader = os.fork()
        if not reader:
            _keep(reading, said)
        os.close(reading)
        child = Child(pid, said)
        child.wait = _then(child.wait, reader)  # type: ignore[method-assign]
        return child

    def together(self, arguments: Sequence[str], count: int = 2) -> list[Child]:
        """The same command in processes that train together, as `torchrun` starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
        return [self.start(arguments, environment=rank) for rank in ranks]

    def new(self) -> Path:
        self._number += 1
        return self.folder / "runs" / f"{self._number}"


def own_bars() -> None:
    """Give every process that will be forked from this one a lock of its own for progress bars.

    tqdm's lies in memory that forked processes share: one that is killed while it holds it, as it makes a bar, leaves
    it held, and all that are forked later wait for it for ever. Nor is there a thread that looks after bars, without
    which a fork would not be whole.
    """
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0


def _then(wait: Callable[..., int], reader: int) -> Callable[..., int]:
    """Waits also for what was said; once."""
    left = [reader]

    def both(limit: float = LIMIT) -> int:
        try:
            return wait(limit)
        finally:
            while left:
                os.waitpid(left.pop(), 0)

    return both


def _child(
    arguments: Sequence[str], out: int, before: Callable[[], object], after: Callable[[int], object]
) -> NoReturn:
    code = 99
    try:
        for number in (1, 2):
            os.dup2(out, number)
        os.close(out)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1) for n in (1, 2))
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        from perpetune.cli import main

        before()
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        after(code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _keep(reading: int, said: Path) -> NoReturn:
    with open(said, "wb") as file, os.fdopen(reading, "rb") as pipe:
        shutil.copyfileobj(pipe, file)
    os._exit(0)


# ---- what goes wrong: each is called in the process that it happens to ----


def at_file_operation(number: int, do: Callable[[], object], under: Path) -> Callable[[], None]:
    """Does something right before the operation of this number, from 0, that writes a file or folder under a path."""

    def install() -> None:
        left = number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event == "open":
                opened = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            else:
                opened = event in WRITING
            if not opened or not any(str(under) in os.fspath(a) for a in arguments if isinstance(a, (str, Path))):
                return
            left -= 1
            if left == -1:
                do()

        sys.addaudithook(hook)

    return install


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room(after: int) -> None:
    """No file grows beyond so many bytes: the operating system's own refusal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def jumping_clock(seed: int) -> Callable[[], None]:
    """Whoever looks at the clock finds it days or years before or after the last time."""
    draw, real = random.Random(seed), (time.time, time.strftime)

    def now() -> float:
        return max(0.0, real[0]() + draw.choice([-1, 1]) * 10 ** draw.uniform(0, 8.5))

    def install() -> None:
        time.time = now
        time.time_ns = lambda: int(1e9 * now())
        time.strftime = lambda form, t=None: real[1](form, time.localtime(now()) if t is None else t)  # type: ignore[assignment]

    return install


# ---- what is there afterwards ----


def contents(run: Path) -> dict[str, bytes]:
    """The files of all commits."""
    folder = run / "commits"
    found = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in found if not p.relative_to(folder).parts[0].startswith(".")
    }
