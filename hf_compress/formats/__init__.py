"""How linear layers lie in a checkpoint in few bits, so that stock libraries read them.

To add a format: one file with its `Layout`, one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from hf_compress.errors import ModelError, RecipeError
from hf_compress.formats import bitsandbytes, compressed_tensors
from hf_compress.formats.bitsandbytes import EightBit, FourBit
from hf_compress.formats.compressed_tensors import Packed
from hf_compress.formats.layout import Layout
from hf_compress.recipe import Quantize

__all__ = ["FORMATS", "Layout", "layout_of", "stored_layout"]

FORMATS: dict[str, Callable[[Quantize], Layout]] = {
    "nf4": lambda settings: FourBit("nf4", settings.block_size or 0, settings.double_quant),
    "fp4": lambda settings: FourBit("fp4", settings.block_size or 0, settings.double_quant),
    "int8": lambda settings: EightBit(),
    "W3A16": lambda settings: Packed(3, settings.block_size),
    "W4A16": lambda settings: Packed(4, settings.block_size),
    "W8A16": lambda settings: Packed(8, settings.block_size),
}


READERS: tuple[Callable[[dict[str, Any]], Layout | None], ...] = (
    bitsandbytes.read,
    compressed_tensors.read,
)
"""Each gives the layout that a `quantization_config` speaks of, if it is one of its own."""


def layout_of(settings: Quantize) -> Layout:
    """The layout that a recipe asks for.

    Raises:
        RecipeError: an unknown format, or one whose library is not installed.
    """
    if settings.format not in FORMATS:
        raise RecipeError(
            f"unknown format {settings.format!r}; the valid ones are {', '.join(FORMATS)}"
        )
    layout = FORMATS[settings.format](settings)
    layout.library()
    return layout


def stored_layout(config: PretrainedConfig) -> Layout | None:
    """The layout in which a checkpoint with this configuration stores linear layers; None where
    it stores no weight in few bits.

    Raises:
        ModelError: a format that is not among `FORMATS`.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    found = said if isinstance(said, dict) else said.to_dict()
    for read in READERS:
        layout = read(found)
        if layout:
            return layout
    raise ModelError(
        f"the checkpoint is quantized by {found.get('quant_method')!r}, which is not read; the "
        f"formats are {', '.join(FORMATS)}. Start from the model as it was before"
    )
