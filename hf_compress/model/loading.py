"""From a recipe's `model` to a block source and a tokenizer, checked against each other."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from hf_compress.errors import ModelError, RecipeError
from hf_compress.model.families import family_of

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]


def resolve_device(name: str) -> torch.device:
    """The device that a recipe names; `auto` asks accelerate."""
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes > 1:
        raise RecipeError(
            f"launched with {state.num_processes} processes; calibration and pruning run in one: "
            "accelerate launch --num_processes 1"
        )
    if name == "auto":
        return state.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device {name!r} is not known; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {name!r} asked for, but torch sees no CUDA device; use auto")
    return device


def resolve_folder(model: str) -> Path:
    """A local folder as it is; anything else is fetched from the Hub.

    Raises:
        ModelError: neither a folder nor a repository that can be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"model {model!r} is not a folder here and not a Hub repository that can be reached "
            f"({type(error).__name__}); check the path or the name"
        ) from error


def load_config(folder: Path) -> PretrainedConfig:
    """config.json of a checkpoint whose family is known; no code of it is run."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; it is not a checkpoint folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(f"{folder}/config.json cannot be used: {error}") from error
    family_of(config)
    return config


def require_full_precision(config: PretrainedConfig) -> None:
    """Raise ModelError for a model whose weights are codes already."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the model is already quantized, and its codes can be neither pruned nor chosen anew; "
            "give the unquantized checkpoint"
        )


def load_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer; raises ModelError if it knows ids that the embedding does not."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_vocabulary(tokenizer, config)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise ModelError if the tokenizer's vocabulary exceeds the embedding."""
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the embedding only "
            f"{config.vocab_size} rows; resize the model's embedding "
            "(resize_token_embeddings) or use the tokenizer that belongs to it"
        )


def resolve_dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    """dtype to compress in; `auto` is the checkpoint's."""
    if name != "auto":
        return getattr(torch, name)
    return config.dtype or torch.float32
