"""Structured pruning, ours against the baselines, in one run: `python -m benchmarks.pruning`.

Every row is pruned at uniform widths from the same statistics of the same text, and
measured on the same held-out windows; differences are paired over windows. Calibration
text and evaluation text are arguments, so that the same table can be made elsewhere.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from hf_compress import pipeline
from hf_compress.recipe import parse_recipe
from hf_compress.report import Metrics, load_metrics

MODEL = Path(".cache/smollm2-135m")
DATA = Path("../shared/data")
METHODS = {
    "obs + fold, pruned stream": {"criterion": "obs", "recollect": True},
    "obs + fold": {"criterion": "obs", "recollect": False},
    "wanda + fold": {"criterion": "wanda", "recollect": False},
    "wanda": {"criterion": "wanda", "fold": False, "recollect": False},
    "magnitude": {"criterion": "magnitude", "fold": False, "recollect": False},
}
HEADER = "| sparsity | method | KV groups, neurons | removed | perplexity | ratio | KL | seconds |"


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--calibration", default=str(DATA / "brown-train.jsonl.gz"))
    parser.add_argument("--evaluation", default=str(DATA / "brown-eval.jsonl.gz"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/pruning.json"))
    arguments = parser.parse_args()
    rows = []
    print(f"forward pass over the calibration text: {_forward_seconds(arguments):.0f} s\n")
    print(HEADER + "\n" + "|---" * HEADER.count("| ") + "|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for sparsity in arguments.sparsity:
            for name in arguments.methods:
                metrics = _measure(arguments, sparsity, name, Path(scratch))
                rows.append({"method": name, **metrics.model_dump(mode="json")})
                print(_row(sparsity, name, metrics), flush=True)
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _measure(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Metrics:
    """One run; all share an output folder, so that calibration happens once."""
    windows = {"num_samples": arguments.num_samples, "max_seq_length": 512}
    recipe = parse_recipe(
        {
            "model": arguments.model,
            "output": scratch / "run",
            "data": {
                "calibration": {"source": arguments.calibration, **windows},
                "evaluation": {"source": arguments.evaluation, "num_samples": 48},
                "num_fitness_samples": 8,
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
    return load_metrics(pipeline.run(recipe) / "metrics.json")


def _row(sparsity: float, name: str, metrics: Metrics) -> str:
    layer, comparison = metrics.layers[0], metrics.comparison
    low, high = metrics.perplexity_ratio_range
    return (
        f"| {sparsity:.0%} | {name} | {layer.num_key_value_heads}, {layer.intermediate_size} "
        f"| {metrics.removed_share:.1%} | {metrics.after.perplexity:.2f} "
        f"| {metrics.perplexity_ratio:.3f} ({low:.3f} to {high:.3f}) "
        f"| {comparison.kl:.3f} ± {comparison.kl_standard_error:.3f} "
        f"| {metrics.seconds['calibrate'] + metrics.seconds['prune']:.0f} |"
    )


@torch.no_grad()
def _forward_seconds(arguments: argparse.Namespace) -> float:
    """Seconds of a plain forward pass over as many tokens, from a sixteenth of them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    ids_BL = torch.randint(5, model.config.vocab_size, (8, 512))
    model(ids_BL)
    start = time.perf_counter()
    model(ids_BL)
    return (time.perf_counter() - start) * arguments.num_samples / len(ids_BL)


if __name__ == "__main__":
    main()
