"""Everything that metrics.json says about a run, gathered from its steps."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_compress import __version__
from hf_compress.evaluation import measure_divergence, measure_speeds
from hf_compress.model.blocks import StreamedCheckpoint, meta_model
from hf_compress.model.divergence import Divergence
from hf_compress.model.families import family_of, has_experts, mlp_width
from hf_compress.model.loading import load_config
from hf_compress.model.parameters import count_parameters, kv_bytes_per_token
from hf_compress.plan import Plan, load_plan
from hf_compress.recipe import Evaluate, Prune, Recipe
from hf_compress.report import Metrics, parse_metrics
from hf_compress.subject import Subject
from hf_compress.workspace import versions


def measure(
    recipe: Recipe,
    settings: Prune,
    subject: Subject,
    pruned: Path,
    ids_NL: torch.Tensor,
    seconds: dict[str, float],
) -> Metrics:
    """Compare the pruned checkpoint with the dense model on the evaluation windows.

    Args:
        pruned: folder of the prune step.
        ids_NL: evaluation windows.
        seconds: time that the earlier steps took.
    """
    report = json.loads((pruned / "report.json").read_text("utf-8"))
    measured = compare_checkpoint(recipe, subject, pruned, ids_NL)
    before, after = measured["before"], measured["after"]
    share = after["non_embedding_parameters"] / before["non_embedding_parameters"]
    raw = {
        **measured,
        "hf_compress_version": __version__,
        "pruning": {
            "sparsity_requested": settings.sparsity,
            "sparsity_achieved": 1 - share,
            "criterion": settings.criterion,
            "fold": settings.fold,
            **_expert_settings(settings),
            "num_calibration_tokens": report["num_calibration_tokens"],
            "candidates": report["candidates"],
        },
        "layers": _layers(subject.source.config, load_plan(pruned / "plan.json"), report["layers"]),
        "verification": {
            name: report["verification"][name]
            for name in ("max_relative_logit_error", "tolerance", "generated_tokens")
        },
        "seconds": seconds,
    }
    return parse_metrics(raw)


def compare_checkpoint(
    recipe: Recipe, subject: Subject, folder: Path, ids_NL: torch.Tensor
) -> dict[str, Any]:
    """What can be measured on a compressed checkpoint at any time: fields of `Metrics`.

    Args:
        recipe: names the texts, and says whether speed is measured.
        subject: the dense model.
        folder: the compressed checkpoint.
        ids_NL: evaluation windows.
    """
    source = subject.source
    config = load_config(folder)
    compressed = StreamedCheckpoint(folder, config, source.dtype, source.device)
    divergence = measure_divergence(source, compressed, ids_NL)
    before, after = _speeds(subject, folder, ids_NL, recipe.evaluate) or [{}, {}]
    return {
        "versions": versions(),
        "base_model": subject.name,
        "before": {
            **_sizes(source.config, source.dtype, subject.folder),
            "perplexity": _exp(divergence.reference_nll_N),
            **before,
        },
        "after": {
            **_sizes(config, source.dtype, folder),
            "perplexity": _exp(divergence.nll_N),
            **after,
        },
        "comparison": _comparison(divergence, ids_NL, recipe),
        "peak_memory_bytes": _peak_memory(source.device),
        "device": _device_name(source.device),
    }


def _comparison(divergence: Divergence, ids_NL: torch.Tensor, recipe: Recipe) -> dict[str, Any]:
    kl, kl_error = divergence.kl
    difference, difference_error = divergence.nll_difference
    return {
        "kl": kl,
        "kl_standard_error": kl_error,
        "log_perplexity_difference": difference,
        "log_perplexity_difference_standard_error": difference_error,
        "num_windows": len(ids_NL),
        "num_tokens": len(ids_NL) * (ids_NL.shape[1] - 1),
        "max_seq_length": ids_NL.shape[1],
        "evaluation_source": _label(recipe.data.evaluation.source),
        "calibration_source": _label(recipe.data.calibration.source),
        "window_nll_before": divergence.reference_nll_N.tolist(),
        "window_nll": divergence.nll_N.tolist(),
        "window_kl": divergence.kl_N.tolist(),
    }


def _speeds(
    subject: Subject, pruned: Path, ids_NL: torch.Tensor, settings: Evaluate
) -> list[dict[str, float]]:
    if not settings.speed:
        return []
    prompt_L = ids_NL.flatten()[: settings.prefill_tokens]
    compressed = AutoModelForCausalLM.from_pretrained(pruned, dtype=subject.source.dtype)
    models = [subject.whole(), compressed.to(subject.source.device)]
    return [asdict(speed) for speed in measure_speeds(models, prompt_L, settings.decode_tokens)]


def _label(source: str) -> str:
    """A source as a reader of a published card should see it: no folders of this machine."""
    return Path(source).name if Path(source).exists() else source


def _sizes(config: Any, dtype: torch.dtype, folder: Path | None) -> dict[str, int]:
    """Sizes of a model; a model that is only in memory has the bytes it would have on disk."""
    count = count_parameters(meta_model(config, dtype))
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder else 0
    return {
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "weight_bytes": on_disk or count.total * dtype.itemsize,
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype.itemsize),
    }


def _layers(config: Any, plan: Plan, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for index, (layer, report) in enumerate(zip(plan.layers, reports, strict=True)):
        experts = has_experts(config, index)
        # In a model with experts, the MLP of a layer that has none stays as it is.
        whole = family_of(config).experts is not None and not experts
        width = config.intermediate_size if whole else mlp_width(config)
        row: dict[str, Any] = {
            "layer": index,
            "intermediate_size_before": width,
            "intermediate_size": width if whole else layer.intermediate_size,
            "num_key_value_heads_before": config.num_key_value_heads,
            "num_key_value_heads": layer.num_key_value_heads,
        }
        if experts:
            row["num_experts_before"] = config.num_experts
            row["num_experts"] = layer.num_experts
        if report["experts"]:
            row["routed_share_removed"] = report["experts"]["routed_share"]
        for part in ("mlp", "attention"):
            if report[part]:
                row[f"{part}_error"] = report[part]["error"]
                row[f"{part}_error_without_fold"] = report[part]["error_without_fold"]
                row[f"{part}_damping"] = report[part]["damping"]
        rows.append(row)
    return rows


def _expert_settings(settings: Prune) -> dict[str, str]:
    if "experts" not in settings.structures:
        return {}
    return {"expert_criterion": settings.expert_criterion, "experts": settings.experts}


def _exp(nll_N: torch.Tensor) -> float:
    return nll_N.mean().exp().item()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
