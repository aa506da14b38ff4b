"""Safetensors shards written tensor by tensor, and folders that appear by rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_compress.errors import CheckpointError
from hf_compress.model.shards import INDEX


class ShardWriter:
    """Takes tensors in any order and writes a shard as soon as its last tensor is there.

    Memory holds the shards that are begun, never the model.
    """

    def __init__(
        self, folder: Path, model: PreTrainedModel, max_shard_size: int | str = "5GB"
    ) -> None:
        self._folder = folder
        state = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            # The tied head is the embedding; stored twice it would only cost bytes.
            for name in model._tied_weights_keys or {}:
                state.pop(name, None)
        self._split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor; names that the checkpoint does not hold (tied ones) pass by."""
        file = self._split.tensor_to_filename.get(name)
        if file is None:
            return
        shard = self._waiting.setdefault(file, {})
        shard[name] = tensor.detach().cpu().contiguous()
        if len(shard) == len(self._split.filename_to_tensors[file]):
            _save(self._waiting.pop(file), self._folder / file)

    def close(self) -> None:
        """Write the index. Raises CheckpointError if tensors are missing."""
        files = self._split.filename_to_tensors
        absent = [file for file in files if not (self._folder / file).is_file()]
        if absent or self._waiting:
            raise CheckpointError(f"the shards {', '.join(absent)} lack tensors; nothing was saved")
        if self._split.is_sharded:
            index = {
                "metadata": self._split.metadata,
                "weight_map": self._split.tensor_to_filename,
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A folder beside `final` that becomes `final` when the block ends without error.

    Whatever stops the block (an error, Ctrl-C) removes it: nothing half-written is left
    under a name that looks finished. A folder already at `final` is replaced.

    Raises:
        CheckpointError: the disk is full or the place is not writable.
    """
    folder = final.with_name(f".{final.name}.incomplete-{os.getpid()}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        _replace(folder, final)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {final}: {error.strerror or error}; free space or choose another output"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(parts: list[Path], folder: Path) -> None:
    """Copy the files of a finished checkpoint into `folder`."""
    for part in parts:
        shutil.copytree(part, folder, dirs_exist_ok=True)


def _replace(folder: Path, final: Path) -> None:
    if final.exists():
        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        final.rename(old)
        folder.rename(final)
        shutil.rmtree(old)
    else:
        folder.rename(final)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(
            f"cannot write {path.name} ({error}); free space or choose another output"
        ) from error
    path.chmod(0o644)
