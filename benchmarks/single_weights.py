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
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_compress import pipeline
from hf_compress.evaluation import measure_divergence
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.divergence import Divergence, mean_and_error, next_tokens
from hf_compress.recipe import Recipe, parse_recipe
from hf_compress.subject import Subject
from hf_compress.workspace import Workspace

MODEL = Path(".cache/smollm2-135m")
DATA = Path("../shared/data")
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
    "| log ratio less than the row below by | seconds (CPU) |"
)


@dataclass(frozen=True)
class Result:
    """One row."""

    pattern: str
    method: str
    zeros: float
    seconds: float
    cpu_seconds: float
    window_nll_before: list[float]
    window_nll: list[float]

    @property
    def ratio(self) -> tuple[float, float]:
        """Log of the ratio to the dense perplexity, and its standard error."""
        return mean_and_error(torch.tensor(self.window_nll) - torch.tensor(self.window_nll_before))


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    arguments = _arguments()
    makers: dict[str, Callable[[Recipe, str, Path], Result]] = dict.fromkeys(
        arguments.methods, _ours
    )
    if arguments.peers:
        _require_llmcompressor()
        makers |= dict.fromkeys(PEERS, _peer)
    print(HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|", flush=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        for pattern in arguments.patterns:
            above = None
            for method, make in makers.items():
                result = make(
                    _recipe(arguments, pattern, method, Path(scratch)), method, Path(scratch)
                )
                results.append(result)
                if above:
                    print(_row(above, result), flush=True)
                above = result
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                rows = [asdict(each) for each in results]
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            if above:
                print(_row(above, None), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.single_weights", description=__doc__
    )
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--calibration", default=str(DATA / "brown-train.jsonl.gz"))
    parser.add_argument("--evaluation", default=str(DATA / "brown-eval.jsonl.gz"))
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=SHOWN)
    parser.add_argument("--peers", action="store_true", help="also llmcompressor, if installed")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/single_weights.json"))
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace, pattern: str, method: str, scratch: Path) -> Recipe:
    windows = {"max_seq_length": arguments.max_seq_length}
    calibration = {"source": arguments.calibration, "num_samples": arguments.num_samples}
    evaluation = {"source": arguments.evaluation, "num_samples": 48}
    share = {"sparsity": 0.5} if pattern == "unstructured" else {}
    settings = {"pattern": pattern, **share, **METHODS.get(method, {})}
    return parse_recipe(
        {
            "model": arguments.model,
            # One workspace for all: what the methods have in common is computed once.
            "output": scratch / "run",
            "data": {
                "calibration": {**calibration, **windows},
                "evaluation": {**evaluation, **windows},
            },
            "stages": [{"stage": "sparsify", **settings}],
            "evaluate": {"speed": False},
        }
    )


def _windows(recipe: Recipe, scratch: Path) -> dict[str, torch.Tensor]:
    """The windows that a run of the recipe has."""
    job = pipeline.Job(recipe, Subject.from_recipe(recipe), Workspace(scratch / "run.work"))
    return job.windows(None, None)


def _ours(recipe: Recipe, method: str, scratch: Path) -> Result:
    job = pipeline.Job(recipe, Subject.from_recipe(recipe), Workspace(scratch / "run.work"))
    windows = job.windows(None, None)
    start = time.process_time()
    folder = job.compress(windows)[-1]
    cpu_seconds = time.process_time() - start
    note = json.loads((folder / "note.json").read_text("utf-8"))
    return _measured(recipe, method, folder, scratch, note["sparsify"], cpu_seconds)


def _peer(recipe: Recipe, method: str, scratch: Path) -> Result:
    """llmcompressor on the same ids, through its documented `oneshot`."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning

    ids_NL = _windows(recipe, scratch)["calibration"]
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
    folder = scratch / "peer"
    model.save_pretrained(folder, save_compressed=False)
    return _measured(recipe, method, folder, scratch, seconds, cpu_seconds)


def _measured(
    recipe: Recipe, method: str, folder: Path, scratch: Path, seconds: float, cpu_seconds: float
) -> Result:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    dense = Subject.from_recipe(recipe).source
    ids_NL = load_file(scratch / "run.work" / "windows" / "windows.safetensors")["evaluation"]
    found: Divergence = measure_divergence(dense, ModelInMemory(model), next_tokens(ids_NL))
    (stage,) = recipe.stages
    return Result(
        stage.pattern if stage.stage == "sparsify" else "",
        method,
        _zeros(model),
        seconds,
        cpu_seconds,
        found.reference_nll_N.tolist(),
        found.nll_N.tolist(),
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
    log_ratio, error = result.ratio
    ratio, low, high = torch.tensor([log_ratio, log_ratio - 2 * error, log_ratio + 2 * error]).exp()
    margin = ""
    if below:
        difference = torch.tensor(below.window_nll) - torch.tensor(result.window_nll)
        margin = "{:.3f} ± {:.3f}".format(*mean_and_error(difference))
    perplexity = torch.tensor(result.window_nll).mean().exp()
    return (
        f"| {result.pattern} | {result.method} | {result.zeros:.1%} | {perplexity:.2f} "
        f"| {ratio:.3f} ({low:.3f} to {high:.3f}) | {margin} "
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
