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
import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.flap import FlapSource
from benchmarks.gates import Gates, prune_by_gates
from benchmarks.table import MARGIN, Measured, Table, add_texts, job_of, recipe_of
from benchmarks.torch_pruning_peer import torch_pruned
from hf_compress import pipeline
from hf_compress.evaluation import measure_divergence
from hf_compress.model.blocks import BlockSource
from hf_compress.plan import load_plan
from hf_compress.recipe import Prune, Recipe
from hf_compress.report import load_metrics
from hf_compress.workspace import PLAN

OBS = "obs + fold"
REFIT = "obs + fold + refit"
FLAP = "FLAP (with biases, per-layer widths)"
TORCH_PRUNING = "Torch-Pruning (Taylor, neurons)"
GATES = "gates + fold"
METHODS: dict[str, dict[str, Any]] = {
    REFIT: {"criterion": "obs"},
    OBS: {"criterion": "obs"},
    "wanda + fold": {"criterion": "wanda"},
    "wanda": {"criterion": "wanda", "fold": False, "recollect": False},
    "magnitude": {"criterion": "magnitude", "fold": False, "recollect": False},
    "obs + fold, no correction": {"criterion": "obs", "correction": 0.0},
    "obs + fold, dense statistics": {"criterion": "obs", "recollect": False},
    "neurons only": {"structures": ["mlp_neurons"]},
    "residual channels": {"structures": ["residual_channels"]},
    "residual channels, not folded": {"structures": ["residual_channels"], "fold": False},
}
LADDER = list(METHODS)[:5]
"""Each should beat the next. `wanda`, dropped and on dense statistics, is Wanda-sp."""
HEADER = (
    "| sparsity | method | KV groups, neurons | removed | perplexity | ratio "
    f"| {MARGIN} | seconds | passes |"
)
TIMED_WINDOWS = 8
PARTS = ("calibrate", "choose layers", "compare splits", "prune", "refit")
"""Of a run, what is compared: everything but the evaluation and the verification."""


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One line of the table."""

    sparsity: float
    method: str
    widths: str
    removed_share: float
    seconds: float
    passes: float


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    arguments = _arguments()
    table = Table(HEADER, _line, arguments.json)
    with tempfile.TemporaryDirectory() as scratch:
        for sparsity in arguments.sparsity:
            table.add(
                PEERS.get(name, _ours)(arguments, sparsity, name, Path(scratch))
                for name in arguments.methods
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    add_texts(parser, "pruning.json")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    names = [*METHODS, FLAP, TORCH_PRUNING, GATES]
    default = [*LADDER, FLAP, TORCH_PRUNING]
    parser.add_argument("--methods", nargs="+", choices=names, default=default)
    parser.add_argument("--gate-steps", type=int, default=Gates.steps)
    parser.add_argument("--round-to", type=int, default=16)
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Recipe:
    settings = {"round_to": arguments.round_to, **METHODS.get(name, {})}
    stages = [{"stage": "prune", "sparsity": sparsity, **settings}]
    if name == REFIT:
        stages.append({"stage": "refit"})
    return recipe_of(arguments, stages, scratch)


def _ours(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Row:
    """One run, and its cost in forward passes."""
    before = forward_seconds(arguments)
    output = pipeline.run(_recipe(arguments, sparsity, name, scratch))
    metrics = load_metrics(output / "metrics.json")
    forward = (before + forward_seconds(arguments)) / 2
    seconds = sum(metrics.seconds.get(part, 0.0) for part in PARTS)
    layer, comparison = metrics.layers[0], metrics.comparison
    widths = f"{layer.num_key_value_heads}, {layer.intermediate_size}"
    if metrics.pruning and metrics.pruning.hidden_size:
        widths += f" ({metrics.pruning.hidden_size} channels)"
    return Row(
        sparsity=sparsity,
        method=name,
        widths=widths,
        removed_share=metrics.removed_share,
        seconds=seconds,
        passes=seconds / forward,
        window_nll_before=comparison.window_nll_before,
        window_nll=comparison.window_nll,
    )


def _peer(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Row:
    """The same of a peer, on the same windows, measured by the same code."""
    _require(name)
    recipe = _recipe(arguments, sparsity, name, scratch)
    job = job_of(recipe)
    subject, windows = job.subject, job.windows(None, None)
    before = forward_seconds(arguments)
    start = time.perf_counter()
    pruned: BlockSource
    if name == FLAP:
        pruned = FlapSource(subject.source, windows["calibration"], sparsity)
        widths, share = "by layer", pruned.removed_share
    else:
        pruned, share = torch_pruned(recipe.model, windows["calibration"], sparsity)
        widths = f"all, {pruned.config.intermediate_size}"
    seconds = time.perf_counter() - start
    forward = (before + forward_seconds(arguments)) / 2
    questions = subject.questions(windows["evaluation"], recipe.seed)
    found = measure_divergence(subject.source, pruned, questions)
    return Row(
        sparsity=sparsity,
        method=name,
        widths=widths,
        removed_share=share,
        seconds=seconds,
        passes=seconds / forward,
        window_nll_before=found.reference_nll_N.tolist(),
        window_nll=found.nll_N.tolist(),
    )


def _gates(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Row:
    """Gates at the widths that `obs` chooses, from its choice of units on; its row's cost but
    for its own pruning is part of theirs."""
    recipe = _recipe(arguments, sparsity, OBS, scratch)
    output = pipeline.run(recipe)
    metrics, plan = load_metrics(output / "metrics.json"), load_plan(output / PLAN)
    job = job_of(recipe)
    windows, model = job.windows(None, None), job.subject.whole()
    before = forward_seconds(arguments)
    start = time.perf_counter()
    stage = recipe.stages[0]
    assert isinstance(stage, Prune)
    gates = Gates(steps=arguments.gate_steps)
    pruned = prune_by_gates(model, windows["calibration"], plan, stage, gates, recipe.seed)
    seconds = time.perf_counter() - start
    forward = (before + forward_seconds(arguments)) / 2
    seconds += sum(metrics.seconds.get(part, 0.0) for part in PARTS if part != "prune")
    questions = job.subject.questions(windows["evaluation"], recipe.seed)
    found = measure_divergence(job.subject.source, pruned, questions)
    layer = plan.layers[0]
    return Row(
        sparsity=sparsity,
        method=name,
        widths=f"{layer.num_key_value_heads}, {layer.intermediate_size}",
        removed_share=metrics.removed_share,
        seconds=seconds,
        passes=seconds / forward,
        window_nll_before=found.reference_nll_N.tolist(),
        window_nll=found.nll_N.tolist(),
    )


def _require(name: str) -> None:
    if name == TORCH_PRUNING and importlib.util.find_spec("torch_pruning") is None:
        raise SystemExit(f"{name} is not installed: pip install torch-pruning")


PEERS = {FLAP: _peer, TORCH_PRUNING: _peer, GATES: _gates}


def _line(row: Row, below: Row | None) -> str:
    return (
        f"| {row.sparsity:.0%} | {row.method} | {row.widths} | {row.removed_share:.1%} "
        f"| {row.perplexity:.2f} | {row.ratio} | {row.margin(below)} "
        f"| {row.seconds:.0f} | {row.passes:.1f} |"
    )


@torch.no_grad()
def forward_seconds(arguments: argparse.Namespace) -> float:
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
