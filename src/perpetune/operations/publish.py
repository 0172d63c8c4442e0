"""An exported folder on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, RunError, first_line
from ..core.files import write_text
from ..learning.lora_factors import CONFIG
from ..learning.routes import ROUTES
from ..models.public_name import public_name


def push_to_hub(folder: str | Path, repository: str, private: bool = True) -> str:
    """Upload a folder as a model; the repository is made where it is not there. The token is that of `hf auth login`
    or HF_TOKEN.

    Args:
        repository: OWNER/NAME, or NAME in one's own account.
        private: of a repository that is made now; one that is there stays as it is.

    Returns:
        Where it is to be seen.

    Raises:
        ConfigError: a name that no repository can have.
        RunError: no token, no connection, no permission; what was exported lies in the folder.
    """
    from huggingface_hub import HfApi, errors

    lost: Any = errors.HfHubHTTPError.__bases__[0]  # of all errors of its HTTP client, whichever that is
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        with _without_places(Path(folder)) as sent:
            api.upload_folder(
                repo_id=made.repo_id, folder_path=str(sent), repo_type="model", commit_message="Export from perpetune"
            )
    except errors.HFValidationError as error:
        raise ConfigError(f"`{repository}` is no name of a repository (OWNER/NAME): {first_line(error)}") from error
    except (lost, errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = (
            "unset HF_HUB_OFFLINE"
            if isinstance(error, errors.OfflineModeIsEnabled)
            else "see that there is a connection"
        )
        if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
            advice = "log in with a token that may write (hf auth login)"
        told = first_line(error).rstrip(".: ")
        raise RunError(f"{folder} is written, and not on the Hub as `{repository}` ({told}): {advice}") from error
    return str(made)


@contextmanager
def _without_places(folder: Path) -> Iterator[Path]:
    """The folder, or a copy in which the base model is called by its name instead of a path here."""
    named = {path: text for path in folder.rglob("*.json") if (text := _named(path)) is not None}
    if not named:
        yield folder
        return
    with tempfile.TemporaryDirectory() as root:
        aside = shutil.copytree(folder, Path(root) / "folder")
        for path, text in named.items():
            write_text(aside / path.relative_to(folder), text)
        yield aside


def _named(path: Path) -> str | None:
    """The text of a file that names the base model by an absolute path, with its name instead; else None."""
    key = {CONFIG: "base_model_name_or_path", ROUTES: "base_model"}.get(path.name)
    told = json.loads(path.read_text(encoding="utf-8")) if key else {}
    if key is None or not os.path.isabs(told.get(key) or ""):
        return None
    return json.dumps({**told, key: public_name(told[key])}, indent=1, ensure_ascii=False)
