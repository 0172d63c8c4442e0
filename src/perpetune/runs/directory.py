"""The run directory: one configuration, one journal, and a commit for every finished task."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..core import processes
from ..core.errors import RunError
from ..core.files import (
    as_sealed,
    aside_of,
    file_digest,
    json_text,
    plain,
    sealed,
    sync,
    write_file,
    write_text,
    writing,
)
from .commit import MANIFEST, Commit, mend, standing
from .config_check import check_same
from .config_file import CONFIG, TWIN, read_config, write_config
from .locks import lock_file

JOURNAL, COMMITS, DAMAGED = "journal.jsonl", "commits", "damaged"
UNFINISHED = "unfinished"  # checkpoints inside the task that is being learned
WORTH_LINKING = 4096  # bytes: a block of most disks


class Run:
    """One run directory, written by one process at a time: of several that train together, by the first.

    Attributes:
        config: what run.yaml holds.
        history: every commit, in the order in which they were written; commits: those that count, see `standing`.
    """

    def __init__(self, path: Path, config: dict[str, Any], lock: FileLock | None = None) -> None:
        self.path, self.config = path, config
        self._lock = lock
        folders = (path / COMMITS).iterdir() if (path / COMMITS).is_dir() else ()
        self.history = [Commit.read(p) for p in sorted(folders) if not p.name.startswith(".")]
        for index, commit in enumerate(self.history):
            parent = self.history[index - 1].digest if index else None
            if commit.manifest["index"] != index or commit.manifest["parent"] != parent:
                raise RunError(f"{commit.path} does not follow the commit before it: {mend(commit.path)}")
        self.commits = standing(self.history)

    @classmethod
    def open(cls, path: str | Path, config: dict[str, Any]) -> Run:
        """Create a run, or continue the one that is there. Of several processes all must call it, and see one folder.

        Args:
            config: what decides the result; must equal what the directory was made with. The keys "versions" and
                "model_name" may differ, and the stream may have another name and have grown.

        Raises:
            RunError: the directory belongs to another configuration or base model, is damaged, is used by another
                process, or cannot be written.
        """
        path, opened = Path(path), []
        processes.by_first(lambda: opened.append(cls._opened(path, config)))
        try:
            run = opened[0] if opened else cls.read(path)
        except RunError:  # it is whole where the first process sees it
            run = None
        if len(set(processes.from_all(run and run.digest))) > 1:
            if run is not None:
                run.close()
            raise RunError(f"{path} is not the same folder on every machine: give one that all of them see (--out)")
        assert run is not None
        return run

    @classmethod
    def _opened(cls, path: Path, config: dict[str, Any]) -> Run:
        with writing(path):
            (path / COMMITS).mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            try:
                for stale in (path / COMMITS).glob(".*"):
                    shutil.rmtree(stale)
                written = cls._configured(path, config)
                journal = path / JOURNAL
                # a crash cut the last line short: the next event starts a new one
                if journal.exists() and not journal.read_bytes().endswith(b"\n"):
                    with open(journal, "a", encoding="utf-8") as file:
                        file.write("\n")
                return cls(path, written, lock)
            except BaseException:
                lock.release()
                raise

    @classmethod
    def _configured(cls, path: Path, config: dict[str, Any]) -> dict[str, Any]:
        """What run.yaml holds, once it is there."""
        if not (path / CONFIG).exists():
            own = {COMMITS, ".lock", TWIN, *(aside_of(path / name).name for name in (CONFIG, TWIN))}
            if _learned(path):
                raise RunError(
                    f"{path} has lost its {CONFIG}: `perpetune verify {path} --repair` restores it from a copy"
                )
            if any(p for p in path.iterdir() if p.name not in own):
                raise RunError(f"{path} holds other files and no {CONFIG}: give an empty or new directory (--out)")
            return write_config(path, config)
        written = read_config(path)
        try:
            check_same(path, written, config)
        except RunError:
            if (path / UNFINISHED).exists():
                raise
            if not _learned(path):
                shutil.rmtree(path / COMMITS)  # no task is learned: nothing is lost with the old settings
                (path / COMMITS).mkdir()
                return write_config(path, config)
            if not all("adopted" in commit.manifest for commit in cls.read(path).history[1:]):
                raise
            training: dict[str, Any] = {k: config[k] for k in ("training", "trainer") if k in config}
            check_same(path, {**written, **plain(training)}, config)
            written = write_config(path, {**written, **training})  # nothing was trained here yet
        return written

    @property
    def digest(self) -> str:
        """Of the newest commit; empty before the first."""
        return self.history[-1].digest if self.history else ""

    def grow(self, config: dict[str, Any]) -> None:
        """Write down that the stream has grown, once it is known that what was learned is still the same."""
        if self.config.get("stream") != plain(config).get("stream"):
            self.config = plain({**self.config, "stream": config["stream"]})
            processes.by_first(lambda: write_config(self.path, self.config))

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """A run that is only looked at: nothing is locked or written, so it may lie on a read-only disk.

        Raises:
            RunError: no run is there, or it is damaged.
        """
        return cls(Path(path), read_config(Path(path)))

    def note(self, event: str, **facts: Any) -> None:
        """Append one line to the journal: what happened when. Clock times live here and nowhere else."""
        if not processes.first():
            return
        told = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
        line = sealed(json.dumps(told, allow_nan=False))
        with writing(self.path / JOURNAL), open(self.path / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(line + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def commit(self, task: str, files: dict[str, Any], facts: dict[str, Any]) -> Commit:
        """Write a finished task aside, sync it, rename it into place. `files` as in `Consolidation.files`."""
        name = f"{len(self.history):04d}-{task}"
        processes.by_first(lambda: self._write(name, task, files, facts))
        self.history.append(Commit.read(self.path / COMMITS / name))
        self.commits = standing(self.history)
        return self.history[-1]

    def _write(self, name: str, task: str, files: dict[str, Any], facts: dict[str, Any]) -> None:
        aside, final = self.path / COMMITS / f".{name}", self.path / COMMITS / name
        with writing(final):
            if aside.exists():
                shutil.rmtree(aside)
            aside.mkdir()
            try:
                for file, content in files.items():
                    write_file(aside / file, content)
                    self._once(aside / file)
                manifest = {
                    "index": len(self.history),
                    "task": task,
                    "parent": self.history[-1].digest if self.history else None,
                    **facts,
                    "files": {file: file_digest(aside / file) for file in sorted(files)},
                }
                write_text(aside / MANIFEST, sealed(json_text(plain(manifest))))
                sync(aside)
                os.rename(aside, final)
                sync(final.parent)
                shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise

    def undo(self, reasons: Sequence[str]) -> Commit:
        """Throw the newest task away: a commit without files, after which the run is what it was before that task."""
        *_, left, newest = standing(self.history)
        task, kept = newest.manifest["task"], {k: left.manifest[k] for k in ("learned", "classes")}
        facts = {"undoes": task, "reasons": list(reasons), **kept}
        undone = self.commit(f"undo-{task}", {}, facts)
        self.note("undo", task=task, reasons=list(reasons))
        return undone

    def _once(self, file: Path) -> None:
        """Where an earlier commit holds a file of this name with the same bytes, there is one on disk for both."""
        if file.stat().st_size < WORTH_LINKING:
            return
        digest = file_digest(file)
        same = [c for c in self.commits if c.manifest["files"].get(file.name) == digest]
        if not same:
            return
        link = file.with_name(f".{file.name}.tmp")
        with contextlib.suppress(OSError):  # a disk without hard links holds it twice
            os.link(same[-1].path / file.name, link)
            os.replace(link, file)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()


def set_aside(path: Path, damaged: Sequence[Path]) -> Path:
    """Move commits (and other files) out of a run, the newest first, into a new folder in it; nothing is deleted.

    Raises:
        RunError: another process uses the run, or it cannot be written.
    """
    with writing(path):
        lock = _lock(path)
        try:
            number = next(n for n in itertools.count(1) if not (path / f"{DAMAGED}-{n}").exists())
            folder = path / f"{DAMAGED}-{number}"
            folder.mkdir()
            for commit in sorted(damaged, reverse=True):  # stopped half way, the run is one with fewer commits
                os.rename(commit, folder / commit.name)
            sync(path / COMMITS)
            sync(folder)
        finally:
            lock.release()
    return folder


def _learned(path: Path) -> bool:
    """Whether there is more than the commit of the untouched model."""
    return len(list((path / COMMITS).iterdir())) > 1


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All events; a line that a crash cut short, or that was damaged, is passed over: what it spoke of was not
    committed, or comes again, or is a matter of clock times alone."""
    try:
        lines = (Path(path) / JOURNAL).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line) if as_sealed(line) else None
            if isinstance(event, dict) and "event" in event:
                events.append({key: value for key, value in event.items() if key != "sha256"})
    return events


def write_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder aside, then put its files in place: those of an earlier one of this kind are replaced.

    Raises:
        RunError: there is a run, or the folder cannot be written; then nothing of it is there.
    """
    if (path / CONFIG).exists():
        raise RunError(f"{path} is a run directory: give another folder (--out)")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            write(aside)
            path.mkdir(exist_ok=True)
            for file in aside.iterdir():
                if (path / file.name).is_dir():
                    shutil.rmtree(path / file.name)
                os.replace(file, path / file.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return path


def _lock(path: Path) -> FileLock:
    """The lock of a run.

    Raises:
        RunError: another process holds it, or the file system has no locks.
    """
    lock = lock_file(path / ".lock")
    if lock is None:
        raise RunError(f"{path} is in use by another process: wait for it, or give another directory (--out)")
    return lock
