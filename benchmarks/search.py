"""Widths of every layer against the best uniform ones: `python -m benchmarks.search`.

Every row meets the same budget on the same calibration text, is pruned by the same code and
measured on the same held-out windows; each is compared with the row below it by the paired
difference of their log perplexities over windows. Seconds are those of calibrating, searching
and pruning, and beside them over the seconds of one plain forward pass over as many tokens.
`--budget decode_latency` asks for measured latency in the place of parameters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pruning import forward_seconds
from benchmarks.table import MARGIN, Measured, Table, add_texts, recipe_of
from hf_compress import pipeline
from hf_compress.recipe import parse_recipe
from hf_compress.report import load_metrics
from hf_compress.stages import read_note

METHODS: dict[str, dict[str, Any]] = {
    "layers, solver and evolution": {"uniform": False},
    "layers, solver alone": {"uniform": False, "generations": 0},
    "best uniform": {"uniform": True},
}
HEADER = (
    "| budget | method | removed | KV bytes | perplexity | ratio (2 standard errors) "
    f"| KL | {MARGIN} | search, prune: seconds | search: passes |"
)


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One line of the table."""

    budget: str
    method: str
    removed_share: float
    kv_share: float
    kl: float
    search_seconds: float
    prune_seconds: float
    passes: float
    decode_tokens_per_second: float | None = None
    dense_decode_tokens_per_second: float | None = None
    report: dict[str, Any]


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    arguments = _arguments()
    table = Table(HEADER, _line, arguments.json)
    with tempfile.TemporaryDirectory() as scratch:
        for share in arguments.shares:
            table.add(
                _row(arguments, share, name, Path(scratch) / f"{share:g}")
                for name in arguments.methods
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    add_texts(parser, "search.json")
    parser.add_argument("--budget", nargs="+", default=["non_embedding_parameters"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--round-to", type=int, default=64)
    parser.add_argument("--fitness", type=int, default=48, help="windows to search on")
    parser.add_argument("--generations", type=int)
    parser.add_argument("--speed", action="store_true", help="also measure tokens per second")
    return parser.parse_args()


def _row(arguments: argparse.Namespace, share: float, name: str, scratch: Path) -> Row:
    budget = dict.fromkeys(arguments.budget, share)
    search = {"stage": "search", "budget": budget, "round_to": arguments.round_to, **METHODS[name]}
    if arguments.generations is not None and "generations" not in search:
        search["generations"] = arguments.generations
    recipe = recipe_of(arguments, [search, {"stage": "prune"}], scratch)
    raw = recipe.model_dump(mode="json")
    raw["data"]["num_fitness_samples"] = arguments.fitness
    raw["evaluate"]["speed"] = arguments.speed
    before = forward_seconds(arguments)
    output = pipeline.run(parse_recipe(raw))
    forward = (before + forward_seconds(arguments)) / 2
    metrics = load_metrics(output / "metrics.json")
    work = output.with_name(output.name + ".work")
    # With those of the steps that it was made from, which an earlier row may have done.
    searching = sum(read_note(work / "search").values())
    return Row(
        budget=f"{', '.join(arguments.budget)} {share:.0%}",
        method=name,
        removed_share=metrics.removed_share,
        kv_share=metrics.after.kv_bytes_per_token / metrics.before.kv_bytes_per_token,
        kl=metrics.comparison.kl,
        search_seconds=searching,
        prune_seconds=metrics.seconds["prune"],
        passes=searching / forward,
        decode_tokens_per_second=metrics.after.decode_tokens_per_second,
        dense_decode_tokens_per_second=metrics.before.decode_tokens_per_second,
        window_nll_before=metrics.comparison.window_nll_before,
        window_nll=metrics.comparison.window_nll,
        report=json.loads((work / "search" / "report.json").read_text("utf-8")),
    )


def _line(row: Row, below: Row | None) -> str:
    return (
        f"| {row.budget} | {row.method} | {row.removed_share:.1%} | {row.kv_share:.0%} "
        f"| {row.perplexity:.2f} | {row.ratio} | {row.kl:.3f} | {row.margin(below)} "
        f"| {row.search_seconds:.0f}, {row.prune_seconds:.0f} | {row.passes:.1f} |"
    )


if __name__ == "__main__":
    main()
