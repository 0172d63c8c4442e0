"""Files are written here alone: whole or not at all, synced, and what an operating system refuses is said plainly."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from ..core.errors import RunError

HEADER = TypeAdapter(dict[str, Any])
ENTRY = 96  # bytes of it, at least
LAST_ENTRY = re.compile(rb',(\n? )"[^"\n]{1,8}": "[^"\n]{64}"\n?\}\s*\Z')
SCALARS = {str, int, float, bool, type(None)}
ARRAYS = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4",
        "F64": "<f8",
    }.items()
}  # fmt: skip


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


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """What a safetensors file holds, as read-only views of its content: of a file of a thousand small arrays, a third
    of the time of `safetensors.numpy.load`, which makes a copy of each.

    Raises:
        RunError: numbers of a kind that predictions never have.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = HEADER.validate_json(content[8:start])  # faster than json
    header.pop("__metadata__", None)
    whole: dict[str, np.ndarray] = {}
    found = {}
    for name, about in header.items():
        kind, (first, last) = about["dtype"], about["data_offsets"]
        if kind not in whole:
            if kind not in ARRAYS:
                raise RunError(f"`{name}` holds numbers of kind {kind}: was it written by a newer perpetune?")
            whole[kind] = np.frombuffer(content, ARRAYS[kind], (len(content) - start) // ARRAYS[kind].itemsize, start)
        size = ARRAYS[kind].itemsize  # tensors are stored by the size of their numbers, the widest first: none is split
        found[name] = whole[kind][first // size : last // size].reshape(about["shape"])
    return found


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = aside_of(path)
    with writing(path):
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def aside_of(path: Path) -> Path:
    """Where `write_text` writes a file before it is put in place."""
    return path.with_name(f".{path.name}.tmp")


def json_text(content: dict[str, Any]) -> str:
    """As `json.dumps(content, indent=1, sort_keys=True)`, but names and numbers of a list on one line: with an indent
    Python writes item by item, and the lists of a commit have one for every task so far."""

    def text(value: Any) -> str:
        flat = isinstance(value, list) and SCALARS.issuperset(map(type, value))
        return json.dumps(value, indent=None if flat else 1, sort_keys=True, allow_nan=False)

    entries = [f"{json.dumps(name)}: {text(content[name])}" for name in sorted(content)]
    return "{\n " + ",\n".join(entries).replace("\n", "\n ") + "\n}"


def sealed(text: str) -> str:
    """The text of a JSON object, with the hash of all that stands before it as one more entry, the last."""
    body, end = (text[:-2], ("\n ", "\n}")) if text.endswith("\n}") else (text[:-1], (" ", "}"))
    return body + _seal(body.encode("utf-8"), end)


def as_sealed(content: bytes) -> bool:
    """Whether the bytes of a JSON object are those that `sealed` made; also where it made none of them.

    A single changed byte is found wherever it is: also in the name of the entry, by the length of its value.
    """
    end = content[-2 * ENTRY :]  # a manifest may be long
    entry = LAST_ENTRY.search(end)
    if entry is None:
        return True
    body, start = content[: len(content) - len(end) + entry.start()], entry[1].decode()
    return end[entry.start() :].decode(errors="replace") == _seal(body, (start, "\n}" if "\n" in start else "}"))


def _seal(body: bytes, around: tuple[str, str]) -> str:
    start, end = around
    return f',{start}"sha256": "{hashlib.sha256(body).hexdigest()}"{end}'


def write_file(path: Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(_unshared(content), path)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        parquet.write_table(content.data.table, path)
    else:
        path.write_text(json.dumps(plain(content), indent=1, sort_keys=True), encoding="utf-8")
    sync(path)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that own their memory: tied weights are written twice, as safetensors demands."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        out[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """JSON's own types: tuples to lists, keys to text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [v if type(v) in (str, int) else plain(v) for v in value]  # names of all tasks, in every commit
    return value
