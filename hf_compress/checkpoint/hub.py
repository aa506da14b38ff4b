"""Uploading a finished checkpoint folder to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from hf_compress.errors import CheckpointError, ModelError
from hf_compress.model.shards import shard_names

UPLOADED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "*.md",
    "*.yaml",
    "*.png",
]
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Upload weights, card, plots, recipe, plan and metrics; returns the commit's URL.

    Raises:
        CheckpointError: the folder is no finished checkpoint, or the Hub refuses.
    """
    _require_finished(folder)
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=UPLOADED,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Compressed with hf_compress",
        )
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is not a repository name: {error}") from error
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(f"cannot push to {repo_id}: {error}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(_refusal(repo_id, error)) from error
    return str(commit.commit_url)


def _require_finished(folder: Path) -> None:
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is not a finished checkpoint: it lacks {name}. Push the output folder "
                "of a run that ended well"
            )
    try:
        absent = [name for name in shard_names(folder) if not (folder / name).is_file()]
    except ModelError as error:
        raise CheckpointError(f"{folder} is not a finished checkpoint: {error}") from error
    if absent:
        raise CheckpointError(f"{folder} is not a finished checkpoint: it lacks {absent[0]}")
    pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder} holds the pickle {pickles[0]}, which can run code on loading; remove it"
        )


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return (
            f"the Hub refuses to write {repo_id} (status {status}); log in with `hf auth login`, "
            "or pass a token that may write there"
        )
    return f"the Hub refuses the push to {repo_id}: {error}"
