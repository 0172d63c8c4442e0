"""Tiny models are read from their folder once in a process, and copied afterwards, which takes a sixth of the time.

How a folder is read is the matter of transformers, and of tests/models, which reads each anew.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

HELD: dict[Any, Any] = {}
PADDED: dict[Any, bool] = {}
TINY = 2_000_000  # bytes of a folder; others are read anew


def hold() -> None:
    """Let transformers' `from_pretrained` give a copy of what it read from the same files with the same arguments."""
    from transformers import PreTrainedModel

    read = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *arguments: Any, **options: Any) -> Any:
        found = None if arguments else key(cls, name, options)
        if found is None:
            return read(cls, name, *arguments, **options)
        if found not in HELD:
            HELD[found] = copy.deepcopy(result := read(cls, name, **options))
            return result
        return copy.deepcopy(HELD[found])

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    _hold_padding()


def _hold_padding() -> None:
    """How an encoder of these files reads its padding is tried once."""
    from perpetune.models import loading

    settle = loading.settle_padding

    def settled(backbone: Any) -> None:
        how = {"pooling": backbone.pooling, "max_length": backbone.max_length}
        found = key(type(backbone.model), backbone.name, how)
        if found not in PADDED:
            settle(backbone)
            if found is not None:
                PADDED[found] = backbone.pads_all
        backbone.pads_all = PADDED.get(found, backbone.pads_all)

    loading.settle_padding = settled


def key(cls: Any, name: Any, options: dict[str, Any]) -> Any:
    """Equal for the same class, files and arguments; none where what is read is not tiny, or an argument unknown."""
    folder = Path(name) if isinstance(name, str | Path) else None
    if folder is None or not folder.is_dir():
        return None
    files = [(file.name, stat.st_mtime_ns, stat.st_size) for file in folder.iterdir() for stat in [file.stat()]]
    if sum(size for _, _, size in files) > TINY:
        return None
    plain = {**options}
    config = plain.pop("config", None)
    if not all(value is None or isinstance(value, str | int | float) or "dtype" in n for n, value in plain.items()):
        return None
    told = config if config is None else config.to_json_string()
    return cls, str(folder), tuple(sorted(files)), told, tuple(sorted((n, str(v)) for n, v in plain.items()))
