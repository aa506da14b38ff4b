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

from hf_compress.calibration import warn_if_few_tokens
from hf_compress.formats import layout_of
from hf_compress.formats.layout import Stored
from hf_compress.model.blocks import meta_model
from hf_compress.model.surgery import widest_output
from hf_compress.model.walk import Walk
from hf_compress.quantization.blocks import BlockQuantizer
from hf_compress.quantization.targets import Target, find_targets
from hf_compress.recipe import Quantize
from hf_compress.stages.context import Context, write_note, write_report
from hf_compress.stages.output import Output
from hf_compress.stages.statistics import sublayer_streams


def check_quantize(config: PretrainedConfig, settings: Quantize) -> dict[str, Target]:
    """The linear layers that will be quantized, by their names in the model; see
    `find_targets`."""
    return find_targets(meta_model(config, torch.float32), settings)


def describe_quantize(
    config: PretrainedConfig, settings: Quantize, dtype: torch.dtype
) -> tuple[list[str], PretrainedConfig]:
    """What the stage will do; the configuration stays."""
    targets = check_quantize(config, settings)
    before = _count(targets) * dtype.itemsize
    after = sum(_bytes(target.shapes(dtype)) for target in targets.values())
    how = "codes chosen on the calibration text" if settings.calibrated else "rounded to nearest"
    return [
        f"quantize   {len(targets)} linear layers to {settings.format}, {how}: "
        f"{before / 1e6:,.1f} -> {after / 1e6:,.1f} MB of weights"
    ], config


def _count(targets: Mapping[str, Target]) -> int:
    return sum(target.outputs * target.inputs for target in targets.values())


def passes_of_quantize(settings: Quantize, tokens: int) -> float:
    """About how many forward passes over the calibration text the stage costs."""
    if not settings.calibrated:
        return 0.0
    return 6.0 + (4.0 * settings.epochs if settings.effort == "best" else 0.0)


def _bytes(stored: Stored) -> int:
    return sum(tensor.nbytes for tensor in stored.values())


def run_quantize(context: Context, settings: Quantize) -> Path:
    """The quantized checkpoint, verified in a fresh process."""
    targets = check_quantize(context.source.config, settings)
    return context.step(
        context.name,
        {
            "settings": settings.model_dump(mode="json"),
            "calibration": context.calibration.model_dump(mode="json"),
        },
        lambda folder: _build(folder, context, settings, targets),
    )


def _build(
    folder: Path, context: Context, settings: Quantize, targets: Mapping[str, Target]
) -> None:
    start = time.perf_counter()
    source, ids_NL, layout = context.source, context.windows["calibration"], layout_of(settings)
    if settings.calibrated:
        num, length = ids_NL.shape
        warn_if_few_tokens(num, length, widest_output(source.config))
    layouts = {name: target.layout for name, target in targets.items()}
    packed = {f"{name}.weight": target.shapes(source.dtype) for name, target in targets.items()}
    model = meta_model(source.config, source.dtype)
    configuration = layout.configuration(_kept(model, targets), layouts)
    model.config.quantization_config = configuration
    output = Output(folder, context, model, packed=packed)
    learned = None
    if settings.effort == "best":
        learned = Walk(source, ids_NL, context.calibration.batch_size)
    quantizer = BlockQuantizer(
        source,
        settings,
        layouts,
        sublayer_streams(context, settings.corrects) if settings.calibrated else None,
        learned,
    )
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
        "quantized_weights": _count(targets),
        "bytes": sum(map(_bytes, packed.values())),
        "layers": [[asdict(linear) for linear in block] for block in reports],
        "learning": [asdict(block) for block in quantizer.learning],
        "verification": asdict(result),
        "num_calibration_tokens": ids_NL.numel() if settings.calibrated else 0,
    }
    write_report(folder, report)


def _kept(model: PreTrainedModel, targets: Mapping[str, Target]) -> list[str]:
    """Linear layers that keep their dtype, the head among them: naming any drops the default."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in targets
    ]
