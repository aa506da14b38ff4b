"""Reading safetensors shards by tensor name, with faults found before the work starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hf_compress.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class ShardReader:
    """Which shard holds which tensor of a checkpoint folder.

    Opening it reads every shard's header, so that a missing or truncated file is one
    clear error before an hour of calibration and not after it.

    Args:
        folder: the checkpoint.
        name_in_memory: what the model calls a tensor of the checkpoint.

    Raises:
        ModelError: no safetensors, or a shard that is missing, truncated or not readable.
    """

    def __init__(self, folder: Path, name_in_memory: Callable[[str], str] = str) -> None:
        self.folder = folder
        self._place_of: dict[str, tuple[str, str]] = {}
        for file in shard_names(folder):
            with self._open(file) as shard:
                names: list[str] = shard.keys()
            self._place_of.update({name_in_memory(stored): (file, stored) for stored in names})

    def __contains__(self, name: str) -> bool:
        return name in self._place_of

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors by name on the CPU; floating point ones as `dtype`."""
        by_file: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            file, stored = self._place_of[name]
            by_file.setdefault(file, []).append((name, stored))
        tensors = {}
        for file, wanted in by_file.items():
            with self._open(file) as shard:
                for name, stored in wanted:
                    value = shard.get_tensor(stored)
                    tensors[name] = value.to(dtype) if value.is_floating_point() else value
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


def naming(model: PreTrainedModel) -> Callable[[str], str]:
    """By transformers' own rules, what `model` calls a tensor of a checkpoint: some are older
    than the names of today, some were saved without the head."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    state = model.state_dict()

    def name_in_memory(stored: str) -> str:
        return rename_source_key(stored, renamings, [], model.base_model_prefix, state)[0]

    return name_in_memory


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
