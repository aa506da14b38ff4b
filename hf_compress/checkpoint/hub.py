"""Uploading a finished checkpoint folder to the Hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants

# HTTPError is the base of huggingface_hub's own errors and of "no connection". Which HTTP
# library it comes from differs between versions, so it is taken from here.
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open

from hf_compress.errors import CheckpointError, ModelError
from hf_compress.model.shards import shard_names

UPLOADED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "README.md",
    "LICENSE*",
    "recipe.yaml",
    "figures/*.png",
    "*.html",
    "modeling_hfc_*.py",
)
"""What goes up: weights, configs, tokenizer, card with its figures, recipe, plan, metrics, and the
modelling files of a checkpoint whose layers differ.
A `*` does not cross folders: nothing below the checkpoint goes up by accident."""
REPLACED = ["model*.safetensors", "model.safetensors.index.json"]
"""Weights that go from the repository unless they are uploaded again. Left there, a
`model.safetensors` of an earlier push would be loaded instead of the new shards."""
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
    """Upload weights, card, figures, recipe, plan and metrics; returns the commit's URL.

    Args:
        folder: a finished checkpoint, such as the output folder of a run.
        repo_id: `user/name`, or `name` in the namespace of the token's owner; created if absent.
        private: visibility of a repository that is created; None is the owner's default.
        revision: branch to push to, created if absent; None is `main`.
        commit_message: first line of the commit.
        create_pr: open a pull request and leave the branch as it is.
        token: None takes the one of the environment or of `hf auth login`.

    Raises:
        CheckpointError: the folder is no finished checkpoint, or the Hub refuses or is not
            reached.
    """
    folder = Path(folder)
    _require_finished(folder)
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"cannot push to {repo_id!r}: HF_HUB_OFFLINE is set; unset it and push again"
        )
    api = HfApi(token=token)
    with _one_clear_error(repo_id, api.endpoint):
        # The answer has the namespace that a bare name lacks.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in _uploaded(folder)],
            delete_patterns=REPLACED,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Compressed with hf_compress",
        )
    return str(commit.commit_url)


@contextmanager
def _one_clear_error(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into a CheckpointError."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is not a repository name: {error}. Give it as `user/name`"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(_refusal(repo_id, error)) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"cannot push to {repo_id!r}: {endpoint} is not reached ({error}); check the "
            "connection and HF_ENDPOINT, and push again: what is already up is not sent twice"
        ) from error
    except (RuntimeError, OSError) as error:
        # Sending a file failed: RuntimeError over LFS, OSError from hf_xet or from the disk.
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise CheckpointError(
            f"cannot push to {repo_id!r}: the upload stopped ({reason}); push again: what is "
            "already up is not sent twice"
        ) from error
    except ValueError as error:
        # huggingface_hub's word for a card with bad metadata, among others.
        raise CheckpointError(f"cannot push to {repo_id!r}: {str(error).strip()}") from error


def _uploaded(folder: Path) -> list[str]:
    paths = (path for pattern in UPLOADED for path in folder.glob(pattern))
    return sorted(
        path.relative_to(folder).as_posix()
        for path in paths
        if path.is_file() and not path.name.startswith(".")
    )


def _require_finished(folder: Path) -> None:
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise _unfinished(folder, f"it lacks {name}")
    try:
        shards = shard_names(folder)
    except ModelError as error:
        raise _unfinished(folder, str(error)) from error
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise _unfinished(folder, f"its index names shards that are absent: {', '.join(absent)}")
    for name in shards:
        _require_whole(folder, name)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickles, which can run code when loaded: {', '.join(pickles)}; "
            "remove them and push again"
        )


def _require_whole(folder: Path, name: str) -> None:
    """Read the header of a shard: it says how long the file has to be."""
    try:
        with safe_open(folder / name, framework="pt"):
            pass
    except SafetensorError as error:
        raise _unfinished(folder, f"{name} is truncated or no safetensors ({error})") from error


def _unfinished(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not a finished checkpoint: {reason}. Push the output folder of a run "
        "that ended well"
    )


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            f"cannot push to {repo_id!r}: the Hub does not accept the token, or there is none "
            "(401); run `hf auth login`, set HF_TOKEN, or pass a token that may write there"
        )
    if status == 403:
        return (
            f"cannot push to {repo_id!r}: the token may not write there (403); choose a "
            "namespace of yours, or pass a token with write access"
        )
    reason = error.server_message or str(error).strip()
    return f"cannot push to {repo_id!r}: the Hub answers {status}: {reason}"
