"""Whether a run directory belongs to the configuration that is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..core.files import plain
from ..streams.tokens import SOURCE

UNWRITTEN = {"trainer": "perpetune"}  # what runs had that do not say
BATCH = "per_device_train_batch_size"
SAVING = ("save_strategy", "save_steps", "save_total_limit")  # training settings that decide nothing about the result


def together(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the batch of all its processes in place of that of each, and of their number."""
    training = config.get("training") or {}
    if BATCH not in training:
        return config
    count = config.get("processes", 1)  # not written by one
    whole = {**config, "training": {**training, BATCH: count * training[BATCH]}}
    return {key: value for key, value in whole.items() if key != "processes"}


def _deciding(config: dict[str, Any]) -> dict[str, Any]:
    training = config.get("training") or {}
    return {**config, "training": {name: value for name, value in training.items() if name not in SAVING}}


def check_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    count, old, new = new.get("processes", 1), _deciding(together(old)), _deciding(together(plain(new)))
    for key, wanted in new.items():
        if key in ("versions", "model_name", "in_memory"):
            continue
        if key == "stream":  # a stream may grow: what was there must still be the same
            found = old.get("stream", {})
            if found.get("source", {}).get("source") == SOURCE:  # no row is known of it that another could differ from
                continue
            for name, value in wanted.items():
                if name not in ("name", "tasks", "labels", "source") and found.get(name) != value:
                    raise RunError(_different(path, f"stream.{name}", found.get(name), value))
            continue
        was = old.get(key, UNWRITTEN.get(key))
        if was != wanted:
            where, a, b = _first_difference(key, was, wanted)
            if where == f"training.{BATCH}" and a % count == 0 and count > 1:
                raise RunError(
                    f"{path} was made with {a} examples in a batch of all processes, now {count} processes take {b}: "
                    f"give {BATCH} {a // count} (--batch-size), or another run directory (--out)"
                )
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
        + ("; for the newest task alone it may be another, with --retry TASK" if where.startswith("training.") else "")
    )
