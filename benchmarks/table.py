"""What the tables of compression benchmarks share: texts, recipes, rows that can be paired.

Every row is measured on the same held-out windows, and compared with the row below it by the
paired difference of their log perplexities over windows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_compress.model.divergence import mean_and_error
from hf_compress.pipeline import Job
from hf_compress.recipe import Recipe, parse_recipe
from hf_compress.subject import Subject
from hf_compress.workspace import Workspace

MODEL = Path(".cache/smollm2-135m")
DATA = Path("../shared/data")
MARGIN = "log ratio less than the row below by"
"""Heading of what `margin` says."""


@dataclass(frozen=True)
class Measured:
    """Negative log-likelihoods of the held-out windows, dense and compressed."""

    window_nll_before: list[float]
    window_nll: list[float]

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.window_nll) / len(self.window_nll))

    @property
    def ratio(self) -> str:
        """To the dense perplexity, with its range of two standard errors."""
        log_ratio, error = _paired(self.window_nll, self.window_nll_before)
        low, high = math.exp(log_ratio - 2 * error), math.exp(log_ratio + 2 * error)
        return f"{math.exp(log_ratio):.3f} ({low:.3f} to {high:.3f})"

    def margin(self, below: Measured | None) -> str:
        """How much less the log of the ratio is than that of the row below."""
        if below is None:
            return ""
        difference, error = _paired(below.window_nll, self.window_nll)
        return f"{difference:.3f} ± {error:.3f}"


def _paired(left: list[float], right: list[float]) -> tuple[float, float]:
    return mean_and_error(torch.tensor(left) - torch.tensor(right))


def add_texts(parser: argparse.ArgumentParser, results: str) -> None:
    """Arguments that every table takes; `results` is the file that it writes."""
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--calibration", default=str(DATA / "brown-train.jsonl.gz"))
    parser.add_argument("--evaluation", default=str(DATA / "brown-eval.jsonl.gz"))
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results") / results)


def recipe_of(
    arguments: argparse.Namespace, stages: Sequence[dict[str, Any]], scratch: Path
) -> Recipe:
    """The recipe of one row; all rows share a workspace, so that what they have in common is
    computed once."""
    windows = {"max_seq_length": arguments.max_seq_length}
    calibration = {"source": arguments.calibration, "num_samples": arguments.num_samples}
    evaluation = {"source": arguments.evaluation, "num_samples": 48}
    return parse_recipe(
        {
            "model": arguments.model,
            "output": scratch / "run",
            "data": {
                "calibration": {**calibration, **windows},
                "evaluation": {**evaluation, **windows},
            },
            "stages": list(stages),
            "evaluate": {"speed": False},
        }
    )


def job_of(recipe: Recipe) -> Job:
    """The job of a row's recipe, in the workspace that a run of it has."""
    workspace = Workspace(recipe.output.with_name(recipe.output.name + ".work"))
    return Job(recipe, Subject.from_recipe(recipe), workspace)


class Table:
    """A table that is printed line by line and kept as JSON.

    Args:
        header: the first line, with columns in bars.
        line: makes one of a row and the one below it.
        path: of the JSON file, written anew after each row.
    """

    def __init__(self, header: str, line: Callable[[Any, Any], str], path: Path) -> None:
        self._line = line
        self._path = path
        self._rows: list[Measured] = []
        print(header + "\n" + "|---" * (header.count("|") - 1) + "|", flush=True)

    def add(self, rows: Iterable[Measured]) -> None:
        """One group of rows, of which each is compared with the next."""
        above: Measured | None = None
        for row in rows:
            self._rows.append(row)
            if above:
                print(self._line(above, row), flush=True)
            above = row
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps([asdict(each) for each in self._rows], indent=1)
            self._path.write_text(text + "\n", encoding="utf-8")
        if above:
            print(self._line(above, None), flush=True)
