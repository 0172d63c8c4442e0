"""The file run.yaml: the resolved configuration of a run, its hash, and a copy to restore it from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import RunError
from ..core.files import plain, write_text
from ..core.paths import OF_THE_PATH, no_path
from .earlier import in_todays_words

CONFIG = "run.yaml"
TWIN = ".run.yaml"  # the copy
SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # plain data alone; libyaml is ten times as fast


def write_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    written: dict[str, Any] = plain(config)
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    for name in (TWIN, CONFIG):  # the one that makes it a run comes last
        write_text(path / name, f"{_first_line(text.encode())}\n{text}")
    return written


def _first_line(content: bytes) -> str:
    """The comment with which run.yaml begins: the hash of what follows."""
    return f"# sha256: {hashlib.sha256(content).hexdigest()}"


def read_config(path: Path, name: str = CONFIG) -> dict[str, Any]:
    """
    Args:
        name: `TWIN` for the copy that is kept beside it.

    Raises:
        RunError: there is no run here, or its configuration cannot be read, or is not as it was written.
    """
    file = Path(path) / name
    mend = f"restore it from a copy; `perpetune verify {path} --repair` has one"
    try:
        content = file.read_bytes()
        config = yaml.load(content.decode("utf-8"), Loader=SAFE)
    except FileNotFoundError as error:
        raise RunError(f"{path} is no run: it holds no {CONFIG}") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno in OF_THE_PATH:
            raise RunError(no_path(file, error)) from error
        raise RunError(f"{file} cannot be read ({type(error).__name__}): {mend}") from error
    if not isinstance(config, dict):
        raise RunError(f"{file} is empty or damaged: {mend}")
    first, _, rest = content.partition(b"\n")
    if (first.startswith(b"#") or b"sha256" in first) and first != _first_line(rest).encode():
        raise RunError(f"{file} is not as it was written: {mend}; if the change is yours, remove its first line")
    return in_todays_words(config)
