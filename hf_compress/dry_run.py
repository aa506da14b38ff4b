"""`hf-compress plan`: what a recipe will do, from config.json alone (meta device)."""

from __future__ import annotations

import torch

from hf_compress.model.blocks import meta_model
from hf_compress.model.families import family_of, native_config
from hf_compress.model.loading import load_config, resolve_dtype, resolve_folder
from hf_compress.model.parameters import count_parameters
from hf_compress.model.surgery import widest_output
from hf_compress.pipeline import check_recipe
from hf_compress.plan import LayerPlan
from hf_compress.pruning import candidate_plans
from hf_compress.recipe import Prune, Recipe

FLOPS_PER_SECOND = {"cpu": 3e11, "cuda": 5e13}
"""Sustained matrix products of a small machine; an order of magnitude, not a promise."""
PASSES = 4.0
"""Forward passes over the calibration text that calibrating and pruning cost together."""


def describe(recipe: Recipe) -> list[str]:
    """Lines that say what each stage will do, its sizes, memory and time."""
    check_recipe(recipe)
    config = load_config(resolve_folder(recipe.model))
    dtype = resolve_dtype(recipe.dtype, config)
    dense = meta_model(config, dtype)
    count = count_parameters(dense)
    data = recipe.data.calibration
    tokens = data.num_samples * data.max_seq_length
    settings = next(stage for stage in recipe.stages if isinstance(stage, Prune))
    lines = [
        f"model      {recipe.model} ({config.model_type}, {config.num_hidden_layers} layers): "
        f"{count.total:,} parameters, {count.non_embedding:,} without embeddings, "
        f"{count.total * dtype.itemsize / 1e6:,.1f} MB in {str(dtype).removeprefix('torch.')}",
        f"calibrate  {tokens:,} tokens from {data.source}",
        f"prune      {settings.sparsity:.1%} of the non-embedding parameters by "
        f"{settings.criterion}, {'folded' if settings.fold else 'not folded'}; candidates:",
    ]
    for plan in candidate_plans(config, settings):
        widths = plan.widths
        pruned = native_config(
            config, widths.intermediate_size, widths.num_key_value_heads, widths.num_experts
        )
        after = count_parameters(meta_model(pruned, dtype))  # type: ignore[arg-type]
        lines.append(
            f"           {widths.num_key_value_heads} KV groups, {_mlp(widths)}: "
            f"{after.total:,} parameters, {after.total * dtype.itemsize / 1e6:,.1f} MB, "
            f"{1 - after.non_embedding / count.non_embedding:.1%} removed"
        )
    lines.append("           the one with the least KL to the dense model is chosen")
    device = "cuda" if recipe.device.startswith("cuda") or _has_cuda(recipe.device) else "cpu"
    seconds = PASSES * 2 * count.total * tokens / FLOPS_PER_SECOND[device]
    lines.append(
        f"memory     about {_peak_bytes(config, dense, tokens, dtype) / 1e9:.1f} GB at peak"
    )
    lines.append(
        f"time       about {max(1, round(seconds / 60))} min to calibrate and prune ({device})"
    )
    lines.append(f"output     {recipe.output}")
    return lines


def _mlp(widths: LayerPlan) -> str:
    if widths.num_experts is not None:
        return f"{widths.num_experts} experts of {widths.intermediate_size} neurons"
    return f"{widths.intermediate_size} neurons"


def _has_cuda(device: str) -> bool:
    return device == "auto" and torch.cuda.is_available()


def _peak_bytes(config, dense, tokens: int, dtype: torch.dtype) -> float:  # type: ignore[no-untyped-def]
    """Skeleton and one block, its Gram matrices in two halves and float64, hidden states."""
    family = family_of(config)
    block = sum(p.numel() for p in dense.get_submodule(f"{family.layers}.0").parameters())
    skeleton = sum(p.numel() for p in dense.parameters()) - block * config.num_hidden_layers
    grams = 6 * 8 * widest_output(config) ** 2
    # Two streams of hidden states: the pruned model and, beside it, the dense one.
    return (skeleton + block + 2 * tokens * config.hidden_size) * dtype.itemsize + grams
