"""Single weights, ours against the baselines: `python -m benchmarks.single_weights [--peers]`.

Every row makes half of the weights of all linear layers in the decoder blocks zero, anywhere or
2 of every 4, from the same calibration text, and is measured on the same held-out windows; each
is compared with the row below it by the paired difference of their log perplexities over
windows. Seconds are wall-clock (and CPU) of everything but the evaluation and the check after
saving. `--peers` adds llmcompressor's SparseGPT and Wanda on the same token ids, measured by
the same code.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.table import MARGIN, Measured, Table, add_texts, job_of, recipe_of
from hf_compress.evaluation import measure_divergence
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.divergence import next_tokens
from hf_compress.recipe import Recipe
from hf_compress.stages import read_note
from hf_compress.subject import Subject

PLAIN: dict[str, Any] = {"refit": False, "correction": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "splitting + refit + correction": {"criterion": "splitting"},
    "sparsegpt + refit + correction": {"criterion": "sparsegpt"},
    "wanda + refit + correction": {"criterion": "wanda"},
    "splitting": {"criterion": "splitting", **PLAIN},
    "sparsegpt": {"criterion": "sparsegpt", **PLAIN},
    "wanda": {"criterion": "wanda", **PLAIN},
    "magnitude": {"criterion": "magnitude", **PLAIN},
    "splitting + refit + correction, owl": {"criterion": "splitting", "allocation": "owl"},
}
SHOWN = ["splitting + refit + correction", "sparsegpt", "wanda", "magnitude"]
PEERS = {
    "llmcompressor SparseGPT": "SparseGPTModifier",
    "llmcompressor Wanda": "WandaPruningModifier",
}
HEADER = (
    "| pattern | method | zeros | perplexity | ratio (2 standard errors) "
    f"| {MARGIN} | seconds (CPU) |"
)


@dataclass(frozen=True, kw_only=True)
class Result(Measured):
    """One row."""

    pattern: str
    method: str
    zeros: float
    seconds: float
    cpu_seconds: float


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    arguments = _arguments()
    makers: dict[str, Callable[[Recipe, str], Result]] = dict.fromkeys(arguments.methods, _ours)
    if arguments.peers:
        _require_llmcompressor()
        makers |= dict.fromkeys(PEERS, _peer)
    table = Table(HEADER, _row, arguments.json)
    with tempfile.TemporaryDirectory() as scratch:
        for pattern in arguments.patterns:
            table.add(
                make(_recipe(arguments, pattern, method, Path(scratch)), method)
                for method, make in makers.items()
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.single_weights", description=__doc__
    )
    add_texts(parser, "single_weights.json")
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=SHOWN)
    parser.add_argument("--peers", action="store_true", help="also llmcompressor, if installed")
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace, pattern: str, method: str, scratch: Path) -> Recipe:
    share = {"sparsity": 0.5} if pattern == "unstructured" else {}
    stage = {"stage": "sparsify", "pattern": pattern, **share, **METHODS.get(method, {})}
    return recipe_of(arguments, [stage], scratch)


def _ours(recipe: Recipe, method: str) -> Result:
    job = job_of(recipe)
    windows = job.windows(None, None)
    start = time.process_time()
    folder = job.compress(windows)[-1]
    cpu_seconds = time.process_time() - start
    return _measured(recipe, method, folder, windows, read_note(folder)["sparsify"], cpu_seconds)


def _peer(recipe: Recipe, method: str) -> Result:
    """llmcompressor on the same ids, through its documented `oneshot`."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning

    windows = job_of(recipe).windows(None, None)
    ids_NL = windows["calibration"]
    (stage,) = recipe.stages
    pattern = stage.pattern if stage.stage == "sparsify" else "unstructured"
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype="auto")
    structure = "0:0" if pattern == "unstructured" else pattern
    modifier = getattr(pruning, PEERS[method])(
        sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids_NL.tolist()]
    start, cpu_start = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier,
        max_seq_length=ids_NL.shape[1],
        num_calibration_samples=len(ids_NL),
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    folder = recipe.output.with_name("peer")
    model.save_pretrained(folder, save_compressed=False)
    return _measured(recipe, method, folder, windows, seconds, cpu_seconds)


def _measured(
    recipe: Recipe,
    method: str,
    folder: Path,
    windows: dict[str, torch.Tensor],
    seconds: float,
    cpu_seconds: float,
) -> Result:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    dense = Subject.from_recipe(recipe).source
    questions = next_tokens(windows["evaluation"])
    found = measure_divergence(dense, ModelInMemory(model), questions)
    (stage,) = recipe.stages
    return Result(
        pattern=stage.pattern if stage.stage == "sparsify" else "",
        method=method,
        zeros=_zeros(model),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        window_nll_before=found.reference_nll_N.tolist(),
        window_nll=found.nll_N.tolist(),
    )


def _zeros(model: torch.nn.Module) -> float:
    """Share of zeros in the matrices of the decoder blocks."""
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.dim() == 2
    ]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def _row(result: Result, below: Result | None) -> str:
    return (
        f"| {result.pattern} | {result.method} | {result.zeros:.1%} | {result.perplexity:.2f} "
        f"| {result.ratio} | {result.margin(below)} "
        f"| {result.seconds:.0f} ({result.cpu_seconds:.0f}) |"
    )


def _require_llmcompressor() -> None:
    try:
        import llmcompressor  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            "--peers compares with llmcompressor, which is not installed: pip install llmcompressor"
        ) from error


if __name__ == "__main__":
    main()
