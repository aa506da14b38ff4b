"""The workspace beside an output: every step's result in a folder that is complete or absent.

A step is identified by a hash of what it was made from. The same command again finds the
steps that are done; a changed recipe redoes those whose inputs changed, and no others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_compress.checkpoint import staging
from hf_compress.model.shards import raw_bytes

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NOTE = "note.json"
"""Seconds that the parts of a step took."""
REPORT = "report.json"
"""What a stage decided and measured."""
PLAN = "plan.json"
PACKAGES = ("torch", "transformers", "hf-compress")


class Workspace:
    """Steps in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for leftover in folder.glob(".*.incomplete-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def step(self, name: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """The folder of a step, built by `build(folder)` unless it is there already."""
        target = self.folder / name
        manifest = _manifest(inputs)
        if _read(target) == manifest:
            logger.info("%s: done before, kept", name)
            return target
        with staging(target) as folder:
            build(folder)
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        return target

    def unfinished(self, name: str, inputs: dict[str, Any]) -> Path:
        """A folder beside a step, for what a build that is cut off leaves to its next try; empty
        where the step would be made from something else by now. Whoever asks removes it."""
        folder = self.folder / f"{name}.unfinished"
        manifest = _manifest(inputs)
        if _read(folder) != manifest:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        return folder

    def key(self, name: str) -> str:
        """The key of a finished step, for the steps that are made from it."""
        manifest = _read(self.folder / name)
        return str(manifest["key"]) if manifest else ""


def versions() -> dict[str, str]:
    """Versions of what decides the bits of a result."""
    return {package: version(package) for package in PACKAGES}


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            whole.update(chunk)
    return whole.hexdigest()


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def digest_model(model: PreTrainedModel) -> str:
    """sha256 of a live model's configuration and weights."""
    whole = hashlib.sha256(model.config.to_json_string().encode())
    for name, value in sorted(model.state_dict().items()):
        whole.update(name.encode())
        whole.update(raw_bytes(value))
    return whole.hexdigest()


def _manifest(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": inputs, "versions": versions(), "key": digest(inputs)}


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
