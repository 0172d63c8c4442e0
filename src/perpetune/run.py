"""The run directory: a task is a commit that is there or not there. The one place where files are written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from safetensors import SafetensorError
from torch import Tensor

from .errors import ConfigError, RunError, nearest

CONFIG, JOURNAL, COMMITS, MANIFEST = "run.yaml", "journal.jsonl", "commits", "commit.json"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what an operating system says about a file into what a user can do about it."""
    try:
        try:
            yield
        except SafetensorError as error:  # hides the operating system's error in its text
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(
                f"the disk is full: could not write {path}; every finished task is safe: free space and start again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise RunError(f"{path} is read-only: give a run directory that can be written to (--out)") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise RunError(f"{path} is in the way of a run directory: give another one (--out)") from error
        raise


@dataclass(frozen=True)
class Commit:
    """A finished task on disk, or that one was taken out. Every file is checked against the hash in its manifest when
    it is read."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Commit:
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            manifest["files"], manifest["task"], manifest["index"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path / MANIFEST} is damaged: {_mend(path)}") from error
        return cls(path, manifest)

    @property
    def digest(self) -> str:
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def has(self, name: str) -> bool:
        return name in self.manifest["files"]

    def _checked(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file() or file_digest(path) != self.manifest["files"][name]:
            state = "missing" if not path.is_file() else "damaged (truncated or changed since it was written)"
            raise RunError(f"{path} is {state}: {_mend(self.path)}")
        return path

    def tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self._checked(name))

    def rows(self, name: str) -> datasets.Dataset:
        import pyarrow.parquet as parquet

        return datasets.Dataset(parquet.read_table(self._checked(name)))

    def json(self, name: str) -> Any:
        return json.loads(self._checked(name).read_text())


def active(commits: Sequence[Commit]) -> list[Commit]:
    """The commits of what was learned and not taken out again, in order: base + these is the model at this point."""
    out = {commit.manifest.get("reverts") for commit in commits}
    return [c for c in commits[1:] if "reverts" not in c.manifest and c.manifest["task"] not in out]


def reverted(commits: Sequence[Commit]) -> list[str]:
    """The tasks that were taken out, in the order in which that was done."""
    return [c.manifest["reverts"] for c in commits if "reverts" in c.manifest]


def commit_of(commits: Sequence[Commit], task: str) -> Commit:
    """The commit of a task that was learned by itself and not taken out.

    Raises:
        ConfigError: there is none.
    """
    learned = commits[-1].manifest["learned"] if commits else []
    if task in reverted(commits):
        raise ConfigError(f"task `{task}` is taken out of this run already: to learn it again, give it another name")
    if task not in learned:
        known = nearest(task, learned) if learned else "it has learned none"
        raise ConfigError(f"this run has learned no task `{task}`: {known}")
    found = [commit for commit in active(commits) if commit.manifest["task"] == task]
    if not found:
        raise ConfigError("this run learned its tasks all at once, so none can be taken out: learn the others anew")
    return found[0]


def _mend(commit: Path) -> str:
    return f"restore it from a copy, or delete {commit} and all later commits, and start again to learn from there"


class Run:
    """One run directory, written by one process at a time."""

    def __init__(self, path: Path, lock: Any) -> None:
        self.path = path
        self._lock = lock
        folders = (path / COMMITS).iterdir() if (path / COMMITS).is_dir() else ()
        self.commits = [Commit.read(p) for p in sorted(folders) if not p.name.startswith(".")]
        for index, commit in enumerate(self.commits):
            parent = self.commits[index - 1].digest if index else None
            if commit.manifest["index"] != index or commit.manifest["parent"] != parent:
                raise RunError(f"{commit.path} does not follow the commit before it: {_mend(commit.path)}")

    @classmethod
    def open(cls, path: str | Path, config: dict[str, Any]) -> Run:
        """Create a run, or continue the one that is there.

        Args:
            config: what decides the result; must equal what the directory was made with. The keys "versions" and
                "model_name" may differ, and the stream may have another name and have grown.

        Raises:
            RunError: the directory belongs to another configuration or base model, is damaged, is used by another
                process, or cannot be written.
        """
        path = Path(path)
        with writing(path):
            (path / COMMITS).mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            for stale in (path / COMMITS).glob(".*"):
                shutil.rmtree(stale)
            if (path / CONFIG).exists():
                old = read_config(path)
                try:
                    _check_same(path, old, config)
                except RunError:
                    if _learned(path):
                        raise
                    shutil.rmtree(path / COMMITS)  # no task is learned: nothing is lost with the old settings
                    (path / COMMITS).mkdir()
                    _write_config(path, config)
            else:
                if any(p for p in path.iterdir() if p.name not in (COMMITS, ".lock")):
                    raise RunError(f"{path} holds other files and no {CONFIG}: give an empty or new directory (--out)")
                _write_config(path, config)
            journal = path / JOURNAL
            if journal.exists() and not journal.read_bytes().endswith(b"\n"):
                with open(journal, "a") as file:  # a crash cut the last line short: the next event starts a new one
                    file.write("\n")
        return cls(path, lock)

    def grow(self, config: dict[str, Any]) -> None:
        """Write down that the stream has grown, once it is known that what was learned is still the same."""
        old = read_config(self.path)
        if old.get("stream") != _plain(config).get("stream"):
            _write_config(self.path, {**old, "stream": config["stream"]})

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """A run that is only looked at: nothing is locked or written, so it may lie on a read-only disk.

        Raises:
            RunError: no run is there, or it is damaged.
        """
        read_config(Path(path))
        return cls(Path(path), None)

    def note(self, event: str, **facts: Any) -> None:
        """Append one line to the journal: what happened when. Clock times live here and nowhere else."""
        line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}, allow_nan=False)
        with writing(self.path / JOURNAL), open(self.path / JOURNAL, "a") as journal:
            journal.write(line + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def commit(self, task: str, files: dict[str, Any], facts: dict[str, Any]) -> Commit:
        """Write a finished task aside, sync it, rename it into place. `files` as in `Consolidation.files`."""
        index = len(self.commits)
        name = f"{index:04d}-{task}"
        aside, final = self.path / COMMITS / f".{name}", self.path / COMMITS / name
        with writing(final):
            if aside.exists():
                shutil.rmtree(aside)
            aside.mkdir()
            try:
                for file, content in files.items():
                    _write(aside / file, content)
                manifest = {
                    "index": index,
                    "task": task,
                    "parent": self.commits[-1].digest if self.commits else None,
                    **facts,
                    "files": {file: file_digest(aside / file) for file in sorted(files)},
                }
                write_text(aside / MANIFEST, json.dumps(_plain(manifest), indent=1, sort_keys=True, allow_nan=False))
                _sync(aside)
                os.rename(aside, final)
                _sync(final.parent)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        self.commits.append(Commit.read(final))
        return self.commits[-1]

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def _learned(path: Path) -> bool:
    """Whether there is more than the commit of the untouched model."""
    return len(list((path / COMMITS).iterdir())) > 1


def _write_config(path: Path, config: dict[str, Any]) -> None:
    write_text(path / CONFIG, yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))


def read_config(path: Path) -> dict[str, Any]:
    """
    Raises:
        RunError: there is no run here, or its configuration cannot be read.
    """
    try:
        config = yaml.safe_load((Path(path) / CONFIG).read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path} is no run: it holds no {CONFIG}") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(
            f"{Path(path) / CONFIG} cannot be read ({type(error).__name__}): restore it from a copy"
        ) from error
    if not isinstance(config, dict):
        raise RunError(f"{Path(path) / CONFIG} is empty or damaged: restore it from a copy")
    return config


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All events; a line cut short by a crash is passed over: what it spoke of was not committed, or comes again."""
    try:
        lines = (Path(path) / JOURNAL).read_text().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


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
                os.replace(file, path / file.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return path


def _write(path: Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(_unshared(content), path)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        parquet.write_table(content.data.table, path)
    else:
        path.write_text(json.dumps(_plain(content), indent=1, sort_keys=True))
    _sync(path)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that own their memory: tied weights are written twice, as safetensors demands."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        out[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> Any:
    lock = open(path / ".lock", "w")  # noqa: SIM115  held as long as the run
    try:
        import fcntl
    except ImportError:
        return lock  # no advisory locks on this platform
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise RunError(
            f"{path} is in use by another process: wait for it, or give another directory (--out)"
        ) from error
    return lock


def _plain(value: Any) -> Any:
    """JSON's own types: tuples to lists, keys to text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _check_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, wanted in _plain(new).items():
        if key in ("versions", "model_name"):
            continue
        if key == "stream":  # a stream may grow: what was there must still be the same
            found = old.get("stream", {})
            for name, value in wanted.items():
                if name not in ("name", "tasks", "labels", "source") and found.get(name) != value:
                    raise RunError(_different(path, f"stream.{name}", found.get(name), value))
            continue
        if old.get(key) != wanted:
            where, a, b = _first_difference(key, old.get(key), wanted)
            raise RunError(_different(path, where, a, b))


def _first_difference(key: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted({*a, *b}):
            if a.get(name) != b.get(name):
                return _first_difference(f"{key}.{name}", a.get(name), b.get(name))
    return key, a, b


def _different(path: Path, where: str, old: Any, new: Any) -> str:
    def short(value: Any) -> str:
        text = "none" if value is None else str(value)
        return text if len(text) < 60 else text[:57] + "..."

    if where == "model.fingerprint":
        return (
            f"{path} was made with another base model (weights {short(old)[:12]}, these are {short(new)[:12]}): "
            "give the model it was made with, or another run directory (--out)"
        )
    return (
        f"{path} was made with another configuration: {where} was {short(old)}, now it is {short(new)}: "
        "use the old setting, or another run directory (--out)"
    )
