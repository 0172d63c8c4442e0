"""The fingerprint of a base model's weights, and what is remembered of it between starts.

Hashing takes a second for half a gigabyte, at every start. So the fingerprint of a large model that is loaded from
files is remembered in the user's cache folder, by the path, size and time of change of these files and by the first
and last bytes of every weight (weights that no file holds are drawn anew, and so are others each time).
`perpetune verify RUN --base` reads all weights, whatever is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.environment import cache_folder

LEAST = 64 * 2**20  # bytes of files; fewer are hashed at once
MOST = 256  # models that are remembered
ENDS = 16  # values at either end of a weight that must be the same
SUFFIXES = {".safetensors", ".bin", ".json", ".gguf", ".h5", ".pt", ".py"}

_files: ContextVar[str | None] = ContextVar("files", default=None)
_remembers: ContextVar[bool] = ContextVar("remembers", default=True)


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all parameters and persistent buffers; within `loaded_from`,
    as it is remembered where files and weights are the same."""
    files = _files.get()
    if files is None or not _remembers.get():
        return computed(model)
    key, cache = _key(files, model), cache_folder() / "fingerprints.json"
    known = _read(cache)
    if key not in known:
        known = {**dict(list(known.items())[1 - MOST :]), key: computed(model)}
        with contextlib.suppress(OSError):  # nothing is lost but time where there is no room for a cache
            cache.parent.mkdir(parents=True, exist_ok=True)
            _write(cache, known)
    return known[key]


def computed(model: nn.Module) -> str:
    """The fingerprint, from all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(_about(name, tensor))
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def loaded_from(source: str | None) -> Iterator[None]:
    """Models that are made within come from the files of this folder or hub id, unchanged (None: from memory)."""
    token = _files.set(_described(source) if source is not None else None)
    try:
        yield
    finally:
        _files.reset(token)


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Every fingerprint is computed from all weights."""
    token = _remembers.set(False)
    try:
        yield
    finally:
        _remembers.reset(token)


def _described(source: str) -> str | None:
    """Paths, sizes and times of the files of a model; None where they are few or not on this machine."""
    folder = Path(source)
    if folder.is_file():
        folder = folder.parent
    elif not folder.is_dir():
        from transformers.utils import cached_file

        missing = {f"_raise_exceptions_for_{w}": False for w in ("missing_entries", "gated_repo", "connection_errors")}
        try:
            found = cached_file(source, "config.json", local_files_only=True, **missing)
        except (OSError, ValueError):
            return None
        if found is None:
            return None
        folder = Path(found).parent
    facts = []
    for file in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
        about = file.stat()
        facts.append((str(file.resolve()), about.st_size, about.st_mtime_ns))
    return json.dumps(facts) if sum(size for _, size, _ in facts) >= LEAST else None


def _key(files: str, model: nn.Module) -> str:
    digest = hashlib.sha256(f"{files}|{type(model).__name__}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(_about(name, tensor))
        flat = tensor.detach().reshape(-1)
        for part in (flat[:ENDS], flat[-ENDS:]) if tensor.numel() else ():
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _about(name: str, tensor: Tensor) -> bytes:
    return f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()


def _read(cache: Path) -> dict[str, str]:
    try:
        known: Any = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(cache: Path, known: dict[str, str]) -> None:
    aside = cache.with_name(f".{cache.name}.{os.getpid()}")
    aside.write_text(json.dumps(known, indent=0), encoding="utf-8")
    os.replace(aside, cache)
