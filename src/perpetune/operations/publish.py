"""An exported folder on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, RunError, first_line


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
        api.upload_folder(
            repo_id=made.repo_id, folder_path=str(folder), repo_type="model", commit_message="Export from perpetune"
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
