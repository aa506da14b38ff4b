"""`stage: sparsify`: the share of every layer, then its zeros, then verify."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PretrainedConfig

from hf_compress.calibration import input_norms, warn_if_few_tokens
from hf_compress.model.blocks import meta_model
from hf_compress.model.surgery import widest_output
from hf_compress.pruning.ratios import (
    Shares,
    check_sparsify,
    global_shares,
    owl_shares,
    uniform_shares,
)
from hf_compress.pruning.unstructured import sparsify_blocks
from hf_compress.recipe import Sparsify
from hf_compress.stages.context import Context, write_note, write_report
from hf_compress.stages.output import Output
from hf_compress.stages.statistics import sublayer_streams


def describe_sparsify(
    config: PretrainedConfig, settings: Sparsify, dtype: torch.dtype
) -> tuple[list[str], PretrainedConfig]:
    """What the stage will do; the configuration stays."""
    weights = check_sparsify(config, settings)
    fitted = ", the rest fitted" if settings.refit else ""
    return [
        f"sparsify   {settings.share:.1%} of {weights:,} weights of linear layers become zero "
        f"({settings.pattern}, {settings.allocation}) by {settings.criterion}{fitted};",
        "           zeros save no memory and no time in stock runtimes",
    ], config


def run_sparsify(context: Context, settings: Sparsify) -> Path:
    """The checkpoint with zeros, verified in a fresh process."""
    check_sparsify(context.source.config, settings)
    return context.step(
        context.name,
        {
            "settings": settings.model_dump(mode="json"),
            "calibration": context.calibration.model_dump(mode="json"),
        },
        lambda folder: _build(folder, context, settings),
    )


def _build(folder: Path, context: Context, settings: Sparsify) -> None:
    start = time.perf_counter()
    source, ids_NL = context.source, context.windows["calibration"]
    if settings.needs_text:
        num, length = ids_NL.shape
        warn_if_few_tokens(num, length, widest_output(source.config))
    shares = _shares(context, settings)
    output = Output(folder, context, meta_model(source.config, source.dtype))
    reports = sparsify_blocks(
        source,
        settings,
        shares,
        streams=sublayer_streams(context, settings.corrects) if settings.needs_text else None,
        probe=output.probe,
        write=output.write,
    )
    output.close()
    seconds = {"sparsify": time.perf_counter() - start}
    result = output.verify()
    seconds["verify"] = time.perf_counter() - start - seconds["sparsify"]
    write_note(folder, seconds)
    linears = [linear for block in reports for linear in block]
    report = {
        "stage": "sparsify",
        "settings": settings.model_dump(mode="json"),
        "zeros": sum(linear.zeros for linear in linears),
        "weights": sum(linear.weights for linear in linears),
        "layers": [[asdict(linear) for linear in block] for block in reports],
        "verification": asdict(result),
        "num_calibration_tokens": ids_NL.numel() if settings.needs_text else 0,
    }
    write_report(folder, report)


def _shares(context: Context, settings: Sparsify) -> Shares:
    source = context.source
    if settings.allocation == "global":
        return global_shares(source, settings.share)
    if settings.allocation == "uniform":
        return uniform_shares(source.config, settings.share)
    norms = input_norms(source, context.some_text(), context.calibration.batch_size)
    return owl_shares(source, settings, norms)
