"""`stage: refit`: train block after block, keep the result only if KL says so, verify."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PretrainedConfig

from hf_compress.block_learning import LearningReport
from hf_compress.model.blocks import meta_model
from hf_compress.model.divergence import compare, next_tokens
from hf_compress.model.walk import Walk, finite_state
from hf_compress.pruning.refit import refit_block
from hf_compress.recipe import Refit
from hf_compress.stages.context import Context, write_note, write_report
from hf_compress.stages.output import Output, is_lower, restore


def describe_refit(
    config: PretrainedConfig, settings: Refit, dtype: torch.dtype
) -> tuple[list[str], PretrainedConfig]:
    """What the stage will do; the configuration stays."""
    line = (
        f"refit      every block on its own output error, {settings.epochs} epochs over the "
        "calibration text; kept if KL to the dense model falls"
    )
    return [line], config


def run_refit(context: Context, settings: Refit) -> Path:
    """The refitted checkpoint, or the one that was found where that is no better."""
    inputs = {"settings": settings.model_dump(mode="json")}
    return context.step(context.name, inputs, lambda folder: _build(context, settings, folder))


def _build(context: Context, settings: Refit, folder: Path) -> None:
    start = time.perf_counter()
    source, dense_source = context.source, context.subject.source
    ids_NL, fitness_NL = context.windows["calibration"], context.windows["fitness"]
    output = Output(folder, context, meta_model(source.config, source.dtype))
    batch_size = context.calibration.batch_size
    walk, beside = Walk(source, ids_NL, batch_size), Walk(dense_source, ids_NL, batch_size)
    reference = Walk(dense_source, fitness_NL)
    found, refitted = Walk(source, fitness_NL), Walk(source, fitness_NL)
    layers: list[LearningReport] = []
    positions = {dense_index: index for index, dense_index in enumerate(context.layers)}
    dense_layers = range(dense_source.config.num_hidden_layers)
    for dense_index in tqdm(dense_layers, desc="refit", unit="block"):
        with dense_source.block(dense_index) as dense:
            for one in (beside, reference):
                one.advance(dense, dense_index)
            if dense_index not in positions:
                continue
            index = positions[dense_index]
            name = f"{source.family.layers}.{index}"
            with source.block(index) as block:
                learned, learning = refit_block(block, dense, index, walk, beside, settings)
                found.advance(block, index)
        for key, value in finite_state(learned, name, "refitted"):
            output.write(key, value)
        for one in (walk, refitted, output.probe):
            one.advance(learned, index)
        layers.append(learning)
    output.close()
    before, after = compare(reference, [found, refitted], next_tokens(fitness_NL).targets_NP)
    kept = is_lower(after.kl_N, before.kl_N)
    seconds = time.perf_counter() - start
    verification = asdict(output.verify()) if kept else restore(context, folder)
    write_note(folder, {"refit": seconds, "verify": time.perf_counter() - start - seconds})
    report = {
        "stage": "refit",
        "settings": settings.model_dump(mode="json"),
        "kept": kept,
        "kl_before": before.kl,
        "kl_after": after.kl,
        "layers": [asdict(layer) for layer in layers],
        "verification": verification,
    }
    write_report(folder, report)
