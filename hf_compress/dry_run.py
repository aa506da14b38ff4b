"""`hf-compress plan`: what a recipe will do, from config.json alone (meta device)."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from hf_compress.calibration import neuron_bytes
from hf_compress.model.blocks import meta_model
from hf_compress.model.families import family_of
from hf_compress.model.loading import (
    load_config,
    require_full_precision,
    resolve_dtype,
    resolve_folder,
)
from hf_compress.model.parameters import block_sizes, count_parameters
from hf_compress.model.surgery import Dimensions, widest_output
from hf_compress.order import check_recipe
from hf_compress.pipeline import require_author
from hf_compress.recipe import Calibrate, Distill, Prune, Quantize, Recipe, Sparsify
from hf_compress.stages import STAGES, in_rounds
from hf_compress.stages.distill import training_bytes

FLOPS_PER_SECOND = {"cpu": 3e11, "cuda": 5e13}
"""Sustained matrix products of a small machine; an order of magnitude, not a promise."""


def describe(recipe: Recipe) -> list[str]:
    """Lines that say what each stage will do, its sizes, memory and time."""
    check_recipe(recipe)
    config = load_config(resolve_folder(recipe.model))
    require_full_precision(config)
    require_author(recipe, family_of(config))
    dtype = resolve_dtype(recipe.dtype, config)
    dense = meta_model(config, dtype)
    count = count_parameters(dense)
    data = recipe.data.calibration
    tokens = data.num_samples * data.max_seq_length
    lines = [
        f"model      {recipe.model} ({config.model_type}, {config.num_hidden_layers} layers): "
        f"{count.total:,} parameters, {count.non_embedding:,} without embeddings, "
        f"{count.total * dtype.itemsize / 1e6:,.1f} MB in {str(dtype).removeprefix('torch.')}",
        f"calibrate  {tokens:,} tokens from {data.source}",
    ]
    found, streams, passes, of_experts, training = config, 1, 0.0, 0.0, 0
    for stage in in_rounds(recipe.stages):
        if isinstance(stage, Calibrate):
            continue
        if isinstance(stage, Distill):
            beside = count.total * dtype.itemsize  # the dense model, or another of about its size
            training = max(training, training_bytes(found, stage) + beside)
        said, after = STAGES[stage.stage].describe(found, stage, dtype)
        if isinstance(stage, Prune) and "expert_neurons" in stage.structures:
            of_experts = max(of_experts, _expert_bytes(found, dtype))
        found = after
        lines += said
        passes += STAGES[stage.stage].passes(stage, tokens)
        if isinstance(stage, Prune | Quantize | Sparsify) and stage.corrects:
            streams = 2
    device = "cuda" if recipe.device.startswith("cuda") or _has_cuda(recipe.device) else "cpu"
    seconds = passes * 2 * count.total * tokens / FLOPS_PER_SECOND[device]
    peak = max(training, _peak_bytes(config, dense, streams * tokens, dtype) + of_experts)
    lines.append(f"memory     about {peak / 1e9:.1f} GB at peak")
    if of_experts:
        lines[-1] += (
            f", {of_experts / 1e9:.1f} GB of it for the neurons of a layer's experts (Gram "
            "matrices, and the experts once more)"
        )
    lines.append(f"time       about {max(1, round(seconds / 60))} min for all stages ({device})")
    lines.append(f"output     {recipe.output}")
    return lines


def _has_cuda(device: str) -> bool:
    return device == "auto" and torch.cuda.is_available()


def _expert_bytes(config: PretrainedConfig, dtype: torch.dtype) -> float:
    """What choosing the neurons inside the experts of a layer takes beside the layer: their Gram
    matrices, and the experts once more, made to give their neurons."""
    width, count = Dimensions.of(config).intermediate_size, config.num_experts
    copies = count * config.hidden_size * (2 * width + config.hidden_size) * dtype.itemsize
    return neuron_bytes(count, width) + copies


def _peak_bytes(config, dense, tokens: int, dtype: torch.dtype) -> float:  # type: ignore[no-untyped-def]
    """Skeleton and one block, its Gram matrices in two halves and float64, and the hidden
    states of `tokens` in all streams together."""
    family = family_of(config)
    sizes = block_sizes(dense, family)
    skeleton = sum(p.numel() for p in dense.parameters()) - sum(sizes)
    grams = 6 * 8 * widest_output(config) ** 2
    return (skeleton + max(sizes) + tokens * config.hidden_size) * dtype.itemsize + grams
