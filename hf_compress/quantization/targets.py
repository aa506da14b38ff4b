"""Which linear layers of a model are stored in few bits, and in how many."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from hf_compress.errors import RecipeError
from hf_compress.formats import layout_of
from hf_compress.formats.layout import Layout, Stored
from hf_compress.model.families import Sublayer, family_of
from hf_compress.model.layers import dense_type, sublayers_of
from hf_compress.model.patterns import matching
from hf_compress.model.surgery import weight_of
from hf_compress.recipe import Quantize

logger = logging.getLogger(__name__)


class Target(NamedTuple):
    """A linear layer to quantize."""

    layout: Layout
    outputs: int
    inputs: int

    def shapes(self, dtype: torch.dtype) -> Stored:
        """What its weight becomes, on the meta device, in a model of this dtype."""
        return self.layout.shapes(self.outputs, self.inputs, dtype)


def find_targets(model: PreTrainedModel, settings: Quantize) -> dict[str, Target]:
    """The linear layers that a recipe quantizes, by their names in the model.

    Args:
        model: may be on the meta device.

    Raises:
        RecipeError: an unknown format or one whose library is missing, a model with blocks whose
            linear layers FAMILIES does not list, a pattern that matches nothing, patterns that
            contradict each other, a layer whose shape the format cannot hold, or nothing left.
    """
    layout = layout_of(settings)
    if family_of(model.config).transposed and not layout.transposed:
        raise RecipeError(
            f"{settings.format}: the library behind it quantizes no layers of the kind that "
            f"{model.config.model_type} has (Conv1D); nf4, fp4 and int8 do"
        )
    linears = _linears(model)
    for pattern in settings.ignore:
        for name in _below(pattern, "ignore", model):
            linears.pop(name, None)
    if not linears:
        raise RecipeError(
            f"ignore leaves nothing to quantize: {', '.join(settings.ignore)}; take out a pattern"
        )
    bits = _bits(model, settings.bits, linears)
    targets = {}
    for name, (outputs, inputs) in linears.items():
        here = layout.at_bits(bits[name]) if name in bits else layout
        if fault := here.fault(outputs, inputs):
            raise RecipeError(
                f"{name} cannot be stored as {settings.format}: {fault}. Change that, or leave "
                f"such layers alone, as in ignore: ['*.{name.rsplit('.', 1)[-1]}']"
            )
        targets[name] = Target(here, outputs, inputs)
    _warn_of_mixed(model, targets)
    return targets


def _sublayers(model: PreTrainedModel) -> dict[str, tuple[Sublayer, ...]]:
    """Of every block, by its name."""
    family = family_of(model.config)
    return {
        f"{family.layers}.{index}": tuple(sublayers_of(family, model.config, index))
        for index in range(model.config.num_hidden_layers)
    }


def _linears(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers of all blocks, by their names in the model."""
    family = family_of(model.config)
    shapes: dict[str, tuple[int, int]] = {}
    for place, sublayers in _sublayers(model).items():
        block = model.get_submodule(place)
        there = {name for name, _ in block.named_modules()}
        for name in (name for sublayer in sublayers for name in sublayer.linears):
            if name not in there:
                raise RecipeError(
                    f"{place} has no linear layer {name}, as FAMILIES says of "
                    f"{dense_type(model.config)}; experts cannot be quantized yet"
                )
            outputs, inputs = weight_of(block, name, family).shape
            shapes[f"{place}.{name}"] = outputs, inputs
    return shapes


def _below(pattern: str, key: str, model: PreTrainedModel) -> set[str]:
    """The modules that a pattern matches, and all within them."""
    names = [name for name, _ in model.named_modules() if name]
    hits = set(matching(pattern, names, family_of(model.config), key))
    return {
        name for name in names if any(name == hit or name.startswith(f"{hit}.") for hit in hits)
    }


def _bits(
    model: PreTrainedModel, said: Mapping[str, int], linears: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Bits of the layers that the patterns single out. No order among patterns: where two of
    them disagree, there is no telling which was meant."""
    by: dict[str, str] = {}
    for pattern in said:
        found = _below(pattern, "bits", model) & linears.keys()
        if not found:
            raise RecipeError(
                f"bits: {pattern!r} matches no linear layer that is quantized; take it out"
            )
        for name in found:
            other = by.setdefault(name, pattern)
            if said[other] != said[pattern]:
                raise RecipeError(
                    f"bits: {other!r} says {said[other]} and {pattern!r} says {said[pattern]} of "
                    f"{name}; narrow one of them, as with 're:' and a regular expression"
                )
    return {name: said[pattern] for name, pattern in by.items()}


def _warn_of_mixed(model: PreTrainedModel, targets: Mapping[str, Target]) -> None:
    """Servers compute layers that read the same input as one, in one format."""
    for place, sublayers in _sublayers(model).items():
        for sublayer in sublayers:
            names = [f"{place}.{name}" for name in sublayer.linears]
            if len({targets[name].layout if name in targets else None for name in names}) > 1:
                logger.warning(
                    "%s read the same input and are stored in different formats: transformers "
                    "loads that, vLLM, which computes them as one layer, does not",
                    ", ".join(names),
                )
                return
