"""Safetensors shards written tensor by tensor, and folders that appear by rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from transformers import PreTrainedModel

from hf_compress.errors import CheckpointError
from hf_compress.formats.layout import Stored
from hf_compress.model.conversion import Conversion
from hf_compress.model.shards import INDEX, raw_bytes

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardWriter:
    """Takes tensors in any order and writes each to its place in its shard at once.

    All shapes are known from the start, so the headers are too; memory holds no tensor.
    (`safetensors` itself writes a file only when it has all of it.)

    Args:
        folder: existing folder for the shards.
        model: on the meta device, of the widths and dtypes to come.
        packed: what weights that are stored in few bits become, by their name in the model: the
            tensors, on the meta device, by what their names end with (`formats.layout.Stored`).
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        max_shard_size: int | str = "5GB",
        packed: Mapping[str, Stored] | None = None,
    ) -> None:
        self._folder = folder
        self._conversion = Conversion(model)
        state = self._conversion.to_disk(dict(model.state_dict()))
        if model.config.tie_word_embeddings:
            # The tied head is the embedding; stored twice it would only cost bytes.
            for name in model._tied_weights_keys or {}:
                state.pop(name, None)
        for name, shapes in (packed or {}).items():
            (stored,) = self._conversion.to_disk({name: state[name]})
            del state[stored]
            state.update(_named(stored, shapes))
        self._split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
        self._absent = set(state)
        self._shards = {
            file: _Shard(folder / file, {name: state[name] for name in names})
            for file, names in self._split.filename_to_tensors.items()
        }

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor of the model, under the names and in the parts that
        `save_pretrained` would give it; what the checkpoint does not hold (a tied head)
        passes by."""
        self._store(self._conversion.to_disk({name: tensor}))

    def add_packed(self, name: str, stored: Stored) -> None:
        """Store what the weight `name` of the model has become in few bits."""
        weight = torch.empty(0, device="meta")
        (on_disk,) = self._conversion.to_disk({name: weight})
        self._store(_named(on_disk, stored))

    def _store(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            file = self._split.tensor_to_filename.get(name)
            if file is not None:
                self._shards[file].write(name, value)
                self._absent.discard(name)

    def close(self) -> None:
        """Write the index. Raises CheckpointError if tensors are missing."""
        if self._absent:
            shown = ", ".join(sorted(self._absent)[:3])
            raise CheckpointError(f"{len(self._absent)} tensors are missing, as {shown}")
        if self._split.is_sharded:
            index = {
                "metadata": self._split.metadata,
                "weight_map": self._split.tensor_to_filename,
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _named(weight: str, stored: Stored) -> Stored:
    """Parts of a weight by their whole names."""
    prefix = weight.removesuffix("weight")
    return {prefix + part: tensor for part, tensor in stored.items()}


class _Shard:
    """One safetensors file: the length of a JSON header, the header, and the tensors without
    a gap, widest dtype first, so that all of them are aligned."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        self._path = path
        self._tensors = tensors
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            tensor, begin = tensors[name], end
            end += tensor.nbytes
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        start = 8 + len(encoded)
        self._places = {name: start + header[name]["data_offsets"][0] for name in tensors}
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(start + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        expected = self._tensors[name]
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"{name} has the shape {tuple(tensor.shape)} and the config says "
                f"{tuple(expected.shape)}"
            )
        with self._path.open("r+b") as file:
            file.seek(self._places[name])
            file.write(raw_bytes(tensor.to(expected.dtype)))


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
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write {final}: {reason}; free space or choose another output"
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
