"""Few bits a weight, ours against rounding to nearest: `python -m benchmarks.quantization`.

Every row of a group stores the same linear layers in the same format, and is measured on the
same held-out windows by the library that the format is of. `closed` is the share of the
perplexity that rounding to nearest costs and the row does not; beside it stands the paired
difference of log perplexities over windows. Seconds are those of calibrating and choosing codes
(and CPU). `--speed` also measures prefill and decode against the dense model.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import Measured, Table, add_texts, job_of, recipe_of
from hf_compress import pipeline
from hf_compress.recipe import parse_recipe
from hf_compress.report import load_metrics
from hf_compress.stages import read_note

NEAREST: dict[str, Any] = {"calibrated": False}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "nf4": {
        "nearest": NEAREST,
        "calibrated": {},
        "calibrated, best": {"effort": "best"},
        "calibrated, own output alone": {"correction": 0.0},
    },
    "nf4, double quantization": {
        "nearest": {"double_quant": True, **NEAREST},
        "calibrated": {"double_quant": True},
    },
    "fp4": {"nearest": NEAREST, "calibrated": {}},
    "int8": {"nearest": NEAREST, "calibrated": {}},
    "W4A16": {"nearest": NEAREST, "calibrated": {}, "calibrated, best": {"effort": "best"}},
    "W3A16": {"nearest": NEAREST, "calibrated": {}, "calibrated, best": {"effort": "best"}},
}
SHOWN = ["nf4", "int8", "W4A16"]
HEADER = (
    "| format | codes | perplexity | ratio (2 standard errors) | closed "
    "| log ratio less than nearest by | MB | seconds (CPU) | prefill, decode against dense |"
)


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One line of the table."""

    format: str
    codes: str
    megabytes: float
    seconds: float
    cpu_seconds: float
    prefill: float | None = None
    decode: float | None = None
    closed: float | None = None
    margin_over_nearest: str = ""


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    add_texts(parser, "quantization.json")
    parser.add_argument("--formats", nargs="+", choices=GROUPS, default=SHOWN)
    parser.add_argument("--speed", action="store_true", help="also measure tokens per second")
    arguments = parser.parse_args()
    table = Table(HEADER, _line, arguments.json)
    for name in arguments.formats:
        table.add(_rows(arguments, name))


def _rows(arguments: argparse.Namespace, group: str) -> Iterator[Row]:
    nearest: Row | None = None
    for codes, settings in GROUPS[group].items():
        with tempfile.TemporaryDirectory() as scratch:
            row = _row(arguments, group, codes, settings, Path(scratch), nearest)
        nearest = nearest or row
        yield row


def _row(
    arguments: argparse.Namespace,
    group: str,
    codes: str,
    settings: dict[str, Any],
    scratch: Path,
    nearest: Row | None,
) -> Row:
    stage = {"stage": "quantize", "format": group.split(",")[0], **settings}
    recipe = recipe_of(arguments, [stage], scratch)
    recipe = parse_recipe(
        {**recipe.model_dump(mode="json"), "evaluate": {"speed": arguments.speed}}
    )
    job = job_of(recipe)
    windows = job.windows(None, None)
    start = time.process_time()
    folder = job.compress(windows)[-1]
    cpu_seconds = time.process_time() - start
    metrics = load_metrics(pipeline.run(recipe) / "metrics.json")
    before, after = metrics.before, metrics.after
    row = Row(
        format=group,
        codes=codes,
        megabytes=after.weight_bytes / 1e6,
        seconds=read_note(folder)["quantize"],
        cpu_seconds=cpu_seconds,
        prefill=_over(after.prefill_tokens_per_second, before.prefill_tokens_per_second),
        decode=_over(after.decode_tokens_per_second, before.decode_tokens_per_second),
        window_nll_before=metrics.comparison.window_nll_before,
        window_nll=metrics.comparison.window_nll,
    )
    if nearest is None:
        return row
    dense = math.exp(sum(row.window_nll_before) / len(row.window_nll_before))
    closed = (nearest.perplexity - row.perplexity) / (nearest.perplexity - dense)
    compared = {"closed": closed, "margin_over_nearest": row.margin(nearest)}
    return Row(**{**vars(row), **compared})


def _over(after: float | None, before: float | None) -> float | None:
    return after / before if after and before else None


def _line(row: Row, _: Row | None) -> str:
    closed = "" if row.closed is None else f"{row.closed:.2f}"
    speed = "" if row.prefill is None else f"{row.prefill:.2f}, {row.decode or 0:.2f}"
    return (
        f"| {row.format} | {row.codes} | {row.perplexity:.2f} | {row.ratio} | {closed} "
        f"| {row.margin_over_nearest} | {row.megabytes:.1f} "
        f"| {row.seconds:.0f} ({row.cpu_seconds:.0f}) | {speed} |"
    )


if __name__ == "__main__":
    main()
