"""`stage: quantize`: codes for every linear layer, in a stock library's layout, then verify."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.calibration import SublayerStreams, warn_if_few_tokens
from hf_compress.errors import RecipeError
from hf_compress.formats import FORMATS, layout_of
from hf_compress.formats.layout import Stored
from hf_compress.model.blocks import meta_model
from hf_compress.model.families import family_of
from hf_compress.model.layers import dense_type, sublayers_of
from hf_compress.model.patterns import matching
from hf_compress.model.surgery import weight_of, widest_output
from hf_compress.model.walk import Walk
from hf_compress.quantization.blocks import BlockQuantizer
from hf_compress.recipe import Quantize
from hf_compress.stages.context import Context, write_note, write_report
from hf_compress.stages.output import Output


def check_quantize(config: PretrainedConfig, settings: Quantize) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the weights that will be quantized, by their names in the model.

    Raises:
        RecipeError: an unknown format, a model with blocks whose linear layers FAMILIES does not
            list, a layer whose shape the format cannot hold, or nothing to quantize.
    """
    if settings.format not in FORMATS:
        raise RecipeError(
            f"unknown format {settings.format!r}; the valid ones are {', '.join(FORMATS)}"
        )
    model, layout = meta_model(config, torch.float32), layout_of(settings)
    shapes = _shapes(model, settings)
    faults = {name: layout.fault(*shape) for name, shape in shapes.items()}
    for name, fault in faults.items():
        if fault:
            layer = name.removesuffix(".weight")
            raise RecipeError(
                f"{layer} cannot be stored as {settings.format}: {fault}. Change that, or leave "
                f"such layers alone, as in ignore: ['*.{layer.rsplit('.', 1)[-1]}']"
            )
    return shapes


def _shapes(model: PreTrainedModel, settings: Quantize) -> dict[str, tuple[int, int]]:
    config, family = model.config, family_of(model.config)
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(config.num_hidden_layers):
        place = f"{family.layers}.{index}"
        block = model.get_submodule(place)
        there = {name for name, _ in block.named_modules()}
        for sublayer in sublayers_of(family, config, index):
            for name in sublayer.linears:
                if name not in there:
                    raise RecipeError(
                        f"{place} has no linear layer {name}, as FAMILIES says of "
                        f"{dense_type(config)}; experts cannot be quantized yet"
                    )
                outputs, inputs = weight_of(block, name, family).shape
                shapes[f"{place}.{name}.weight"] = outputs, inputs
    names = [name for name, _ in model.named_modules() if name]
    ignored = {name for pattern in settings.ignore for name in matching(pattern, names, family)}
    left = {
        name: shape
        for name, shape in shapes.items()
        if not any(name == f"{each}.weight" or name.startswith(f"{each}.") for each in ignored)
    }
    if not left:
        raise RecipeError(
            f"ignore leaves nothing to quantize: {', '.join(settings.ignore)}; take out a pattern"
        )
    return left


def describe_quantize(
    config: PretrainedConfig, settings: Quantize, dtype: torch.dtype
) -> tuple[list[str], PretrainedConfig]:
    """What the stage will do; the configuration stays."""
    shapes, layout = check_quantize(config, settings), layout_of(settings)
    before = sum(outputs * inputs for outputs, inputs in shapes.values()) * dtype.itemsize
    after = sum(_bytes(layout.shapes(*shape, dtype)) for shape in shapes.values())
    how = "codes chosen on the calibration text" if settings.calibrated else "rounded to nearest"
    return [
        f"quantize   {len(shapes)} linear layers to {settings.format}, {how}: "
        f"{before / 1e6:,.1f} -> {after / 1e6:,.1f} MB of weights"
    ], config


def passes_of_quantize(settings: Quantize) -> float:
    """About how many forward passes over the calibration text the stage costs."""
    if not settings.calibrated:
        return 0.0
    return 6.0 + (4.0 * settings.epochs if settings.effort == "best" else 0.0)


def _bytes(stored: Stored) -> int:
    return sum(tensor.nbytes for tensor in stored.values())


def run_quantize(context: Context, settings: Quantize) -> Path:
    """The quantized checkpoint, verified in a fresh process."""
    shapes = check_quantize(context.source.config, settings)
    return context.step(
        context.name,
        {
            "settings": settings.model_dump(mode="json"),
            "calibration": context.calibration.model_dump(mode="json"),
        },
        lambda folder: _build(folder, context, settings, shapes),
    )


def _build(
    folder: Path, context: Context, settings: Quantize, shapes: Mapping[str, tuple[int, int]]
) -> None:
    start = time.perf_counter()
    source, ids_NL, layout = context.source, context.windows["calibration"], layout_of(settings)
    if settings.calibrated:
        num, length = ids_NL.shape
        warn_if_few_tokens(num, length, widest_output(source.config))
    packed = {name: layout.shapes(*shape, source.dtype) for name, shape in shapes.items()}
    model = meta_model(source.config, source.dtype)
    configuration = layout.configuration(_kept(model, shapes))
    model.config.quantization_config = configuration
    output = Output(folder, context, model, packed=packed)
    learned = None
    if settings.effort == "best":
        learned = Walk(source, ids_NL, context.calibration.batch_size)
    streams = _streams(context, settings)
    quantizer = BlockQuantizer(source, settings, layout, shapes, streams, learned)
    reports = quantizer.run(output.probe, output.write, output.write_packed)
    output.close()
    seconds = {"quantize": time.perf_counter() - start}
    result = output.verify(layout.tolerance)
    seconds["verify"] = time.perf_counter() - start - seconds["quantize"]
    write_note(folder, seconds)
    report: dict[str, Any] = {
        "stage": "quantize",
        "settings": settings.model_dump(mode="json"),
        "library": configuration["quant_method"],
        "block_size": layout.grid(source.dtype).block or None,
        "quantized_weights": sum(outputs * inputs for outputs, inputs in shapes.values()),
        "bytes": sum(map(_bytes, packed.values())),
        "layers": [[asdict(linear) for linear in block] for block in reports],
        "learning": [asdict(block) for block in quantizer.learning],
        "verification": asdict(result),
        "num_calibration_tokens": ids_NL.numel() if settings.calibrated else 0,
    }
    write_report(folder, report)


def _kept(model: PreTrainedModel, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Linear layers that keep their dtype, the head among them: naming any drops the default."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in shapes
    ]


def _streams(context: Context, settings: Quantize) -> SublayerStreams | None:
    if not settings.calibrated:
        return None
    return SublayerStreams(
        context.source,
        context.windows["calibration"],
        beside=settings.corrects,
        weighting=context.calibration.token_weighting,
        batch_size=context.calibration.batch_size,
    )
