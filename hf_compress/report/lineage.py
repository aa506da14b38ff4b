"""What the card of a dense checkpoint says that the compressed one's card has to repeat."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def license_of(folder: str | Path) -> str | None:
    """The licence id in the metadata of a checkpoint's README.md, such as `apache-2.0`.

    Returns:
        None where there is no README.md, or it names no single licence that can be read.
    """
    return _stated(Path(folder), "license")


def base_model_of(folder: str | Path) -> str | None:
    """The Hub id that a checkpoint's README.md names as what it was made from.

    Returns:
        None where there is no README.md, or it names no single valid id.
    """
    stated = _stated(Path(folder), "base_model")
    try:
        validate_repo_id(stated or "")
    except HFValidationError:
        return None
    return stated


def _stated(folder: Path, key: str) -> str | None:
    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.get(key)
    except (yaml.YAMLError, ValueError):
        # Somebody else's card; a fault in it must not stop a run that is otherwise done.
        return None
    return found if isinstance(found, str) and found else None
