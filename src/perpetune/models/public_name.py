"""What a model is called where others read of it: its repository on the Hub, or the last part of where it lies here."""

from __future__ import annotations

import os
from pathlib import Path


def on_hub(name: str | None) -> bool:
    """Whether this is the name of a repository, and no file or folder here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def repository(name: str | None) -> str | None:
    """The repository on the Hub that a model is of, by its name or by its place in the Hub's cache
    (`models--OWNER--NAME/snapshots/...`); else None."""
    if on_hub(name):
        return name
    kept = [part for part in Path(name or "").parts if part.startswith("models--")]
    return kept[-1].removeprefix("models--").replace("--", "/") if kept else None


def public_name(name: str) -> str:
    """The repository, or the last part of the path: where a file lies is nobody else's business."""
    return repository(name) or os.path.basename(os.path.abspath(name))


def without_places(word: str) -> str:
    """A word of a command line, of which an absolute path is cut to its last part: `--out=/somewhere/runs/a` is
    `--out=a`."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return option + equals + (public_name(value) if os.path.isabs(value) else value)
