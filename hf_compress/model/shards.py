"""Reading safetensors shards by tensor name, with faults found before the work starts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from hf_compress.errors import ModelError
from hf_compress.formats.layout import Layout

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class ShardReader:
    """Which shard holds which tensor of a checkpoint folder.

    Opening it reads every shard's header, so that a missing or truncated file is one
    clear error before an hour of calibration and not after it.

    Raises:
        ModelError: no safetensors, or a shard that is missing, truncated or not readable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] = {}
        for name in shard_names(folder):
            with self._open(name) as shard:
                self._file_of.update(dict.fromkeys(shard.keys(), name))

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def read(self, names: Iterable[str], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """Tensors by name on the CPU; floating point ones as `dtype`, or as they are stored."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with self._open(file) as shard:
                for name in wanted:
                    value = shard.get_tensor(name)
                    cast = dtype is not None and value.is_floating_point()
                    tensors[name] = value.to(dtype) if cast else value
        return tensors

    def lacks(self, names: list[str]) -> str:
        """The message for tensors that the model needs and no shard holds."""
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return (
            f"{self.folder} lacks the tensors {shown}; either the checkpoint is incomplete "
            "(fetch it again) or config.json belongs to another model"
        )

    def _open(self, name: str):  # type: ignore[no-untyped-def]
        path = self.folder / name
        if not path.is_file():
            raise ModelError(f"{path} is named by {INDEX} but missing; fetch the checkpoint again")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ModelError(
                f"{path} is truncated or not a safetensors file ({error}); fetch it again"
            ) from error


class Shards(Protocol):
    """Tensors of a checkpoint by name."""

    @property
    def names(self) -> list[str]: ...

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]: ...

    def lacks(self, names: list[str]) -> str: ...


class PackedReader:
    """The same of a checkpoint that stores some weights in few bits: these are read as their
    library does, and what lies beside them has no name here.

    Args:
        transposed: whether the model holds weights as [I, O]; formats store all as [O, I].
    """

    def __init__(self, shards: ShardReader, layout: Layout, transposed: bool) -> None:
        self._shards, self._layout, self._transposed = shards, layout, transposed
        self.lacks = shards.lacks
        stored = set(shards.names)
        prefixes = {
            name.removesuffix(part)
            for part in layout.parts
            for name in stored
            if name.endswith(f".{part}")
        }
        self._parts = {
            f"{prefix}weight": [
                prefix + part for part in ("weight", *layout.parts) if prefix + part in stored
            ]
            for prefix in prefixes
        }
        taken = {part for parts in self._parts.values() for part in parts}
        self.names = [*self._parts, *(name for name in shards.names if name not in taken)]

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors by name on the CPU; floating point and packed ones as `dtype`."""
        wanted = list(names)
        plain = [name for name in wanted if name not in self._parts]
        tensors = self._shards.read(plain, dtype)
        for name in wanted:
            if name in self._parts:
                prefix = name.removesuffix("weight")
                stored = self._shards.read(self._parts[name], None).items()
                parts = {part.removeprefix(prefix): value for part, value in stored}
                weight_OI = self._layout.unpack(parts, dtype)
                tensors[name] = weight_OI.T if self._transposed else weight_OI
        return tensors


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """What a shard holds of a tensor, without a copy where it lies so in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def shard_names(folder: Path) -> list[str]:
    """File names of the weight shards of a checkpoint folder, in order."""
    index = folder / INDEX
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is truncated or no shard index; fetch it again") from error
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise ModelError(
        f"{folder} holds no {SINGLE} and no {INDEX}; pickled checkpoints (.bin) are not read: "
        "load one with transformers and save_pretrained it first"
    )
