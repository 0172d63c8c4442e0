"""A finished task on disk."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from ..core.errors import ConfigError, RunError, nearest
from ..core.files import as_sealed, file_digest, read_arrays

MANIFEST = "commit.json"


@dataclass(frozen=True)
class Commit:
    """A finished task on disk, or that one was taken out. Every file is checked against the hash in its manifest when
    it is read."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Commit:
        try:
            content = (path / MANIFEST).read_bytes()
            manifest = json.loads(content)
            manifest["files"], manifest["task"], manifest["index"]
            if "learned" in manifest:  # one string for a name that each of a thousand commits has
                manifest["learned"] = [sys.intern(name) for name in manifest["learned"]]
            if not as_sealed(content):
                raise ValueError("another hash")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path / MANIFEST} is damaged: {mend(path)}") from error
        return cls(path, manifest)

    @property
    def digest(self) -> str:
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes on disk; of a file that several commits share, the part of this one."""
        return sum(file.stat().st_size // file.stat().st_nlink for file in self.path.iterdir())

    def has(self, name: str) -> bool:
        return name in self.manifest["files"]

    def _checked(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file() or file_digest(path) != self.manifest["files"][name]:
            raise self._damaged(name)
        return path

    def _damaged(self, name: str) -> RunError:
        path = self.path / name
        state = "missing" if not path.is_file() else "damaged (truncated or changed since it was written)"
        return RunError(f"{path} is {state}: {mend(self.path)}")

    def tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self._checked(name))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The tensors of a file, which must be of kinds that numpy knows; read-only."""
        path = self.path / name
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]:
            raise self._damaged(name)
        return read_arrays(content)

    def rows(self, name: str) -> datasets.Dataset:
        import pyarrow.parquet as parquet

        return datasets.Dataset(parquet.read_table(self._checked(name)))

    def json(self, name: str) -> Any:
        return json.loads(self._checked(name).read_text(encoding="utf-8"))


def standing(history: Sequence[Commit]) -> list[Commit]:
    """The commits that count: without tries that were thrown away, and without the commits that say so. A run is what
    these alone make of it, as if it had never tried."""
    kept: list[Commit] = []
    for commit in history:
        if "undoes" in commit.manifest:
            kept.pop()
        else:
            kept.append(commit)
    return kept


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


def mend(commit: Path) -> str:
    back = f"perpetune verify {commit.parent.parent} --repair"
    return (
        f"restore it from a copy, or go back to the last whole commit with `{back}` and start again to learn from there"
    )
