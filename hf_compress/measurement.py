"""Everything that metrics.json says about a run, gathered from its steps."""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_compress import __version__
from hf_compress.evaluation import measure_divergence, measure_speeds
from hf_compress.formats import stored_layout
from hf_compress.model.blocks import BlockSource, ModelInMemory, StreamedCheckpoint, meta_model
from hf_compress.model.divergence import Divergence, Questions
from hf_compress.model.families import family_of, has_experts
from hf_compress.model.layers import PREFIX
from hf_compress.model.loading import load_config
from hf_compress.model.parameters import count_parameters, kv_bytes_per_token
from hf_compress.model.surgery import Dimensions
from hf_compress.plan import Plan, compose
from hf_compress.recipe import Evaluate, Recipe
from hf_compress.report import Metrics, parse_metrics
from hf_compress.subject import Subject
from hf_compress.workspace import REPORT, versions


def measure(
    recipe: Recipe,
    subject: Subject,
    results: list[Path],
    ids_NL: torch.Tensor,
    seconds: dict[str, float],
) -> Metrics:
    """Compare the compressed checkpoint with the dense model on the evaluation windows.

    Args:
        results: folder of each stage, in order; the last holds the compressed checkpoint.
        ids_NL: evaluation windows.
        seconds: time that the earlier steps took.
    """
    reports = [json.loads((folder / REPORT).read_text("utf-8")) for folder in results]
    measured = compare_checkpoint(recipe, subject, results[-1], ids_NL)
    raw = {
        **measured,
        "hf_compress_version": __version__,
        "verification": {
            name: reports[-1]["verification"][name]
            for name in ("relative_logit_error", "tolerance", "generated_tokens")
        },
        "seconds": seconds,
    }
    prunes = [report for report in reports if report["stage"] == "prune"]
    if prunes:
        kept = measured["after"]["non_embedding_parameters"]
        raw["pruning"] = _pruning(prunes, 1 - kept / measured["before"]["non_embedding_parameters"])
        plan = compose([Plan.model_validate(report["plan"]) for report in prunes])
        raw["layers"] = _layers(subject.source.config, plan, prunes[-1]["layers"])
        if plan.hidden_size is not None:
            raw["pruning"] |= {
                "hidden_size_before": subject.source.config.hidden_size,
                "hidden_size": plan.hidden_size,
                "channel_criterion": _narrowed_by(prunes),
            }
    for report in reports:
        if report["stage"] == "refit":
            raw["refit"] = {
                "kept": report["kept"],
                "epochs": report["settings"]["epochs"],
                "kl_before": report["kl_before"][0],
                "kl_after": report["kl_after"][0],
            }
    distillations = [report for report in reports if report["stage"] == "distill"]
    if distillations:
        raw["distillation"] = _distilled(distillations[-1])
    zeroings = [report for report in reports if report["stage"] == "sparsify"]
    if zeroings:
        raw["zeroing"] = _zeroing(zeroings[-1])
    if reports[-1]["stage"] == "quantize":
        raw["quantization"] = _quantization(reports[-1])
    return parse_metrics(raw)


def _quantization(report: dict[str, Any]) -> dict[str, Any]:
    settings = ("format", "double_quant", "calibrated", "effort")
    linears = [linear for block in report["layers"] for linear in block]
    errors: dict[str, float | None] = {}
    for name in ("error", "error_nearest"):
        found = [linear[name] for linear in linears if linear[name] is not None]
        errors[name] = sum(found) / len(found) if found else None
    return {
        **{name: report["settings"][name] for name in settings},
        "library": report["library"],
        "block_size": report["block_size"],
        "weights": report["quantized_weights"],
        "bytes": report["bytes"],
        "num_calibration_tokens": report["num_calibration_tokens"],
        **errors,
    }


def _distilled(report: dict[str, Any]) -> dict[str, Any]:
    settings = report["settings"]
    return {
        **{name: report[name] for name in ("kept", "tokens", "minutes", "kl_before", "kl_after")},
        **{name: settings[name] for name in ("loss", "cross_entropy", "method")},
        "teacher": _label(report["teacher"]) if settings["teacher"] else None,
    }


def _zeroing(report: dict[str, Any]) -> dict[str, Any]:
    settings = ("pattern", "criterion", "refit", "allocation")
    return {
        **{name: report["settings"][name] for name in settings},
        **{name: report[name] for name in ("zeros", "weights", "num_calibration_tokens")},
    }


def _pruning(reports: list[dict[str, Any]], achieved: float) -> dict[str, Any]:
    """All `prune` stages as one; what was compared is what the last of them compared."""
    last = reports[-1]
    asked = [report["settings"]["sparsity"] for report in reports]
    # Widths that a search or a plan says ask for what comes out.
    kept = math.prod(1 - share for share in asked) if all(asked) else 1 - achieved
    narrowed = last["plan"]["hidden_size"] is not None
    return {
        "sparsity_requested": 1 - kept,
        "sparsity_achieved": achieved,
        "criterion": last["settings"]["channel_criterion" if narrowed else "criterion"],
        "fold": last["settings"]["fold"],
        **_expert_settings(last["settings"]),
        "num_calibration_tokens": last["num_calibration_tokens"],
        "candidates": last["candidates"],
        "whole_by_kl": any(
            report["dropped_layers"] + report["dropped_sublayers"] for report in reports
        ),
        "search": _searched(last["search"]) if last["search"] else None,
    }


def _searched(report: dict[str, Any]) -> dict[str, Any]:
    """What the card says of a `search` stage."""
    found: dict[str, Any] = {
        "budget": {name: limit / report["dense"][name] for name, limit in report["limits"].items()},
        "layers_differ": report.get("is_better_than_uniform", False),
    }
    if "held_out" in report:
        difference, error = report["gain"]
        found |= {
            "generations": len(report["history"]),
            "kl": report["held_out"]["evolved"][0],
            "kl_of_uniform": report["held_out"]["uniform"][0],
            "kl_difference": difference,
            "kl_difference_standard_error": error,
        }
    return found


def _narrowed_by(reports: list[dict[str, Any]]) -> str:
    """The criterion of the last stage that removed channels of the residual stream."""
    narrowed = [report["settings"] for report in reports if report["plan"]["hidden_size"]]
    return narrowed[-1]["channel_criterion"]


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
    compressed = _as_it_computes(folder, config, source)
    questions = subject.questions(ids_NL, recipe.seed)
    divergence = measure_divergence(source, compressed, questions)
    before, after = _speeds(subject, folder, ids_NL, recipe.evaluate) or [{}, {}]
    return {
        "versions": versions(),
        "has_modeling_files": config.model_type.startswith(PREFIX),
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
        "comparison": {
            "predicts": "masked" if source.family.masked else "next",
            **_comparison(divergence, questions, recipe),
        },
        "peak_memory_bytes": _peak_memory(source.device),
        "device": _device_name(source.device),
    }


def _as_it_computes(folder: Path, config: Any, source: BlockSource) -> BlockSource:
    """The compressed model: streamed, or in memory where its library makes more of the inputs
    than the weights that it reads back would (LLM.int8 rounds them)."""
    layout = stored_layout(config)
    if layout is None or layout.tolerance is None:
        return StreamedCheckpoint(folder, config, source.dtype, source.device)
    auto_class = source.family.auto_class
    model = auto_class.from_pretrained(folder, dtype=source.dtype, device_map=source.device)
    return ModelInMemory(model)


def _comparison(divergence: Divergence, questions: Questions, recipe: Recipe) -> dict[str, Any]:
    kl, kl_error = divergence.kl
    difference, difference_error = divergence.nll_difference
    return {
        "kl": kl,
        "kl_standard_error": kl_error,
        "log_perplexity_difference": difference,
        "log_perplexity_difference_standard_error": difference_error,
        "num_windows": questions.ids_NL.shape[0],
        "num_tokens": questions.num_tokens,
        "max_seq_length": questions.ids_NL.shape[1],
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
    config, family = subject.source.config, subject.source.family
    length, decode_tokens = settings.prefill_tokens, settings.decode_tokens
    if family.masked:
        decode_tokens = 0
    if family.learned_positions:
        length = min(length, config.max_position_embeddings - decode_tokens)
    prompt_L = ids_NL.flatten()[:length]
    compressed = family.auto_class.from_pretrained(
        pruned, dtype=subject.source.dtype, device_map=subject.source.device
    )
    models = [subject.whole(), compressed]
    return [asdict(speed) for speed in measure_speeds(models, prompt_L, decode_tokens)]


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
    for index in range(config.num_hidden_layers):
        dims = Dimensions.of(config, index)
        row: dict[str, Any] = {
            "layer": index,
            "intermediate_size_before": dims.intermediate_size,
            "intermediate_size": 0,
            "num_key_value_heads_before": dims.num_key_value_heads,
            "num_key_value_heads": 0,
            "heads_per_group_before": dims.heads_per_group,
            "heads_per_group": 0,
        }
        rows.append(row)
        mixed = has_experts(config, index)
        # In a model with experts, the MLP of a layer that has none stays as it is.
        whole = family_of(config).experts is not None and not mixed
        width = config.intermediate_size if whole else dims.intermediate_size
        row["intermediate_size_before"] = width
        if mixed:
            row |= {"num_experts_before": config.num_experts, "num_experts": 0}
        if index not in plan.positions:
            continue
        layer, report = plan.layers[plan.positions[index]], reports[plan.positions[index]]
        row |= {
            "intermediate_size": width if whole else layer.intermediate_size,
            "num_key_value_heads": layer.num_key_value_heads,
            "heads_per_group": layer.heads_per_group or dims.heads_per_group,
        }
        if "attention" in layer.skip:
            row |= {"num_key_value_heads": 0, "heads_per_group": 0}
        if "mlp" in layer.skip:
            row |= {"intermediate_size": 0}
        if mixed:
            row["num_experts"] = layer.num_experts or config.num_experts
        if report["experts"]:
            row["routed_share_removed"] = report["experts"]["routed_share"]
        if report["expert_neurons"]:
            row["experts_with_few_tokens"] = report["expert_neurons"]["few_tokens"]
            row["experts_not_folded"] = report["expert_neurons"]["not_folded"]
        for part in ("mlp", "attention", "mlp_input", "attention_input"):
            if report[part]:
                row[f"{part}_error"] = report[part]["error"]
                row[f"{part}_error_without_fold"] = report[part]["error_without_fold"]
                row[f"{part}_damping"] = report[part]["damping"]
    return rows


def _expert_settings(settings: dict[str, Any]) -> dict[str, str]:
    if "experts" not in settings["structures"]:
        return {}
    return {name: settings[name] for name in ("expert_criterion", "experts")}


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
