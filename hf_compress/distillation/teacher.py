"""Another model as the teacher: loaded as asked, and refused unless it reads the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_compress.errors import ModelError, RecipeError
from hf_compress.model.loading import resolve_folder


def load_teacher(
    name: str, dtype: str, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """A causal language model from a folder or the Hub, on `device`.

    Args:
        name: of the folder, or its Hub id.
        dtype: `auto`, a torch dtype, or `int8` or `nf4` for bitsandbytes.
        tokenizer: the student's.

    Raises:
        ModelError: it cannot be loaded, or its vocabulary is another one.
        RecipeError: bitsandbytes is not installed.
    """
    folder = resolve_folder(name)
    check_same_tokens(name, folder, tokenizer)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **_how(dtype, device))
    except ValueError as error:
        raise ModelError(f"the teacher {name!r} cannot be loaded: {error}") from error
    return model if dtype in ("int8", "nf4") else model.to(device)


def check_same_tokens(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError unless every token has the same id under the teacher's tokenizer."""
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    ours = tokenizer.get_vocab()
    unlike = sorted(token for token in ours.keys() | theirs if ours.get(token) != theirs.get(token))
    if unlike:
        token = unlike[0]
        raise ModelError(
            f"the teacher {name!r} has another vocabulary: {len(theirs)} tokens and the student "
            f"{len(ours)}; {len(unlike)} differ, such as {token!r} with the id "
            f"{theirs.get(token)} and {ours.get(token)}. Distributions can only be compared token "
            "by token: give a teacher with the same tokenizer, one of the same model family"
        )


def _how(dtype: str, device: torch.device) -> dict[str, Any]:
    if dtype not in ("int8", "nf4"):
        return {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"teacher_dtype: {dtype} needs bitsandbytes: pip install 'hf-compress[bitsandbytes]'"
        ) from error
    if dtype == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    return {"quantization_config": config, "device_map": {"": str(device)}}
