"""Structured pruning, ours against the baselines, in one run: `python -m benchmarks.pruning`.

Every row is pruned at uniform widths from the same calibration text and measured on the
same held-out windows; each is compared with the row below it by the paired difference of
their log perplexities over windows. The last column is the cost: seconds to calibrate, to
choose the split, to prune and to fold, over the seconds of one plain forward pass over as
many tokens, timed just before and after. Model and texts are arguments, so that the same
table can be made elsewhere.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_compress import pipeline
from hf_compress.model.divergence import mean_and_error
from hf_compress.recipe import parse_recipe
from hf_compress.report import Metrics, load_metrics

MODEL = Path(".cache/smollm2-135m")
DATA = Path("../shared/data")
METHODS: dict[str, dict[str, Any]] = {
    "obs + fold": {"criterion": "obs"},
    "wanda + fold": {"criterion": "wanda"},
    "wanda": {"criterion": "wanda", "fold": False, "recollect": False},
    "magnitude": {"criterion": "magnitude", "fold": False, "recollect": False},
    "obs + fold, no correction": {"criterion": "obs", "correction": 0.0},
    "obs + fold, dense statistics": {"criterion": "obs", "recollect": False},
}
LADDER = list(METHODS)[:4]
"""Each should beat the next."""
HEADER = (
    "| sparsity | method | KV groups, neurons | removed | perplexity | ratio "
    "| log ratio less than the row below by | seconds | passes |"
)
TIMED_WINDOWS = 8


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    arguments = _arguments()
    rows = []
    print(HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for sparsity in arguments.sparsity:
            above: tuple[str, Metrics, float] | None = None
            for name in arguments.methods:
                metrics, passes = _measure(arguments, sparsity, name, Path(scratch))
                if above:
                    print(_row(sparsity, *above, below=metrics), flush=True)
                above = (name, metrics, passes)
                rows.append({"method": name, "passes": passes, **metrics.model_dump(mode="json")})
            if above:
                print(_row(sparsity, *above, below=None), flush=True)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--calibration", default=str(DATA / "brown-train.jsonl.gz"))
    parser.add_argument("--evaluation", default=str(DATA / "brown-eval.jsonl.gz"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=LADDER)
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/pruning.json"))
    return parser.parse_args()


def _measure(
    arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path
) -> tuple[Metrics, float]:
    """One run, and its cost in forward passes; all share a workspace, so that what the
    methods have in common is computed once."""
    windows = {"max_seq_length": arguments.max_seq_length}
    recipe = parse_recipe(
        {
            "model": arguments.model,
            "output": scratch / "run",
            "data": {
                "calibration": {
                    "source": arguments.calibration,
                    "num_samples": arguments.num_samples,
                    **windows,
                },
                "evaluation": {"source": arguments.evaluation, "num_samples": 48, **windows},
            },
            "stages": [
                {
                    "stage": "prune",
                    "sparsity": sparsity,
                    "round_to": arguments.round_to,
                    **METHODS[name],
                }
            ],
            "evaluate": {"speed": False},
        }
    )
    before = _forward_seconds(arguments)
    metrics = load_metrics(pipeline.run(recipe) / "metrics.json")
    forward = (before + _forward_seconds(arguments)) / 2
    return metrics, _seconds(metrics) / forward


def _seconds(metrics: Metrics) -> float:
    """Of everything but the evaluation and the verification."""
    return sum(
        metrics.seconds.get(stage, 0.0)
        for stage in ("calibrate", "choose layers", "compare splits", "prune")
    )


def _row(sparsity: float, name: str, metrics: Metrics, passes: float, below: Metrics | None) -> str:
    layer = metrics.layers[0]
    low, high = metrics.perplexity_ratio_range
    margin = ""
    if below:
        difference, error = mean_and_error(
            torch.tensor(below.comparison.window_nll) - torch.tensor(metrics.comparison.window_nll)
        )
        margin = f"{difference:.3f} ± {error:.3f}"
    return (
        f"| {sparsity:.0%} | {name} | {layer.num_key_value_heads}, {layer.intermediate_size} "
        f"| {metrics.removed_share:.1%} | {metrics.after.perplexity:.2f} "
        f"| {metrics.perplexity_ratio:.3f} ({low:.3f} to {high:.3f}) | {margin} "
        f"| {_seconds(metrics):.0f} | {passes:.1f} |"
    )


@torch.no_grad()
def _forward_seconds(arguments: argparse.Namespace) -> float:
    """Seconds of a plain forward pass over as many tokens, from the median of three
    batches."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    shape = (TIMED_WINDOWS, arguments.max_seq_length)
    ids_BL = torch.randint(5, model.config.vocab_size, shape)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        model(ids_BL)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:]) * arguments.num_samples / TIMED_WINDOWS


if __name__ == "__main__":
    main()
