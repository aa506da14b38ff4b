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
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.flap import FlapSource
from hf_compress import pipeline
from hf_compress.evaluation import measure_divergence
from hf_compress.model.divergence import mean_and_error
from hf_compress.recipe import Recipe, parse_recipe
from hf_compress.report import load_metrics
from hf_compress.subject import Subject
from hf_compress.workspace import Workspace

MODEL = Path(".cache/smollm2-135m")
DATA = Path("../shared/data")
REFIT = "obs + fold + refit"
FLAP = "FLAP (with biases, per-layer widths)"
METHODS: dict[str, dict[str, Any]] = {
    REFIT: {"criterion": "obs"},
    "obs + fold": {"criterion": "obs"},
    "wanda + fold": {"criterion": "wanda"},
    "wanda": {"criterion": "wanda", "fold": False, "recollect": False},
    "magnitude": {"criterion": "magnitude", "fold": False, "recollect": False},
    "obs + fold, no correction": {"criterion": "obs", "correction": 0.0},
    "obs + fold, dense statistics": {"criterion": "obs", "recollect": False},
}
LADDER = list(METHODS)[:5]
"""Each should beat the next. `wanda`, dropped and on dense statistics, is Wanda-sp."""
HEADER = (
    "| sparsity | method | KV groups, neurons | removed | perplexity | ratio "
    "| log ratio less than the row below by | seconds | passes |"
)
TIMED_WINDOWS = 8
PARTS = ("calibrate", "choose layers", "compare splits", "prune", "refit")
"""Of a run, what is compared: everything but the evaluation and the verification."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    sparsity: float
    method: str
    widths: str
    removed_share: float
    seconds: float
    passes: float
    window_nll_before: list[float]
    window_nll: list[float]

    @property
    def log_ratio(self) -> tuple[float, float]:
        """Of the perplexities, compressed to dense, and its standard error."""
        return mean_and_error(torch.tensor(self.window_nll) - torch.tensor(self.window_nll_before))


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    arguments = _arguments()
    rows: list[Row] = []
    print(HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for sparsity in arguments.sparsity:
            above: Row | None = None
            for name in arguments.methods:
                measure = _flap if name == FLAP else _ours
                row = measure(arguments, sparsity, name, Path(scratch))
                rows.append(row)
                if above:
                    print(_line(above, row), flush=True)
                above = row
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps([asdict(each) for each in rows], indent=1)
                arguments.json.write_text(text + "\n", encoding="utf-8")
            if above:
                print(_line(above, None), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--calibration", default=str(DATA / "brown-train.jsonl.gz"))
    parser.add_argument("--evaluation", default=str(DATA / "brown-eval.jsonl.gz"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, FLAP], default=[*LADDER, FLAP])
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/pruning.json"))
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Recipe:
    windows = {"max_seq_length": arguments.max_seq_length}
    calibration = {"source": arguments.calibration, "num_samples": arguments.num_samples}
    evaluation = {"source": arguments.evaluation, "num_samples": 48}
    settings = {"round_to": arguments.round_to, **METHODS.get(name, {})}
    stages = [{"stage": "prune", "sparsity": sparsity, **settings}]
    if name == REFIT:
        stages.append({"stage": "refit"})
    return parse_recipe(
        {
            "model": arguments.model,
            # One workspace for all: what the methods have in common is computed once.
            "output": scratch / "run",
            "data": {
                "calibration": {**calibration, **windows},
                "evaluation": {**evaluation, **windows},
            },
            "stages": stages,
            "evaluate": {"speed": False},
        }
    )


def _ours(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Row:
    """One run, and its cost in forward passes."""
    before = _forward_seconds(arguments)
    output = pipeline.run(_recipe(arguments, sparsity, name, scratch))
    metrics = load_metrics(output / "metrics.json")
    forward = (before + _forward_seconds(arguments)) / 2
    seconds = sum(metrics.seconds.get(part, 0.0) for part in PARTS)
    layer, comparison = metrics.layers[0], metrics.comparison
    return Row(
        sparsity,
        name,
        f"{layer.num_key_value_heads}, {layer.intermediate_size}",
        metrics.removed_share,
        seconds,
        seconds / forward,
        comparison.window_nll_before,
        comparison.window_nll,
    )


def _flap(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Row:
    """The same of a peer, on the same windows, measured by the same code."""
    recipe = _recipe(arguments, sparsity, name, scratch)
    subject = Subject.from_recipe(recipe)
    windows = pipeline.Job(recipe, subject, Workspace(scratch / "run.work")).windows(None, None)
    before = _forward_seconds(arguments)
    start = time.perf_counter()
    pruned = FlapSource(subject.source, windows["calibration"], sparsity)
    seconds = time.perf_counter() - start
    forward = (before + _forward_seconds(arguments)) / 2
    questions = subject.questions(windows["evaluation"], recipe.seed)
    found = measure_divergence(subject.source, pruned, questions)
    return Row(
        sparsity,
        name,
        "by layer",
        pruned.removed_share,
        seconds,
        seconds / forward,
        found.reference_nll_N.tolist(),
        found.nll_N.tolist(),
    )


def _line(row: Row, below: Row | None) -> str:
    ratio, error = row.log_ratio
    margin = ""
    if below:
        difference, of_difference = mean_and_error(
            torch.tensor(below.window_nll) - torch.tensor(row.window_nll)
        )
        margin = f"{difference:.3f} ± {of_difference:.3f}"
    low, high = math.exp(ratio - 2 * error), math.exp(ratio + 2 * error)
    perplexity = math.exp(sum(row.window_nll) / len(row.window_nll))
    return (
        f"| {row.sparsity:.0%} | {row.method} | {row.widths} | {row.removed_share:.1%} "
        f"| {perplexity:.2f} | {math.exp(ratio):.3f} ({low:.3f} to {high:.3f}) | {margin} "
        f"| {row.seconds:.0f} | {row.passes:.1f} |"
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
