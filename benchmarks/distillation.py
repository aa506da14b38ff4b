"""What distillation gives back: `python -m benchmarks.distillation`.

Without a word, the table: SmolLM2-135M pruned by 30 and 50 % and then trained on the same tokens
with each loss, measured on the same held-out windows; a row is compared with the row below it by
the paired difference of log perplexities over windows. `--memory`: peak memory of the chunked loss
and of the textbook's at two vocabularies. `--speed`: tokens per second of a training step, and of a
plain `Trainer` step and the teacher's forward pass together.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from benchmarks.table import MARGIN, Measured, Table, add_texts, recipe_of
from hf_compress import pipeline
from hf_compress.distillation.losses import Head, Objective, fused_loss, teacher_loss
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.distillation.windows import WindowDataset
from hf_compress.recipe import parse_recipe
from hf_compress.report import load_metrics

METHODS: dict[str, dict[str, Any] | None] = {
    "forward KL": {"loss": "forward_kl"},
    "cross-entropy only": {"cross_entropy": 1.0},
    "not trained": None,
}
HEADER = (
    "| sparsity | trained with | perplexity | ratio (2 standard errors) | KL "
    f"| {MARGIN} | tokens | minutes | kept |"
)
VOCABULARIES = (49_152, 128_256)
TOKENS, WIDTH = 2048, 576
"""Of the loss whose memory is measured: four windows, SmolLM2-135M's hidden size."""
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One line of the table."""

    sparsity: float
    method: str
    kl: float
    tokens: int
    minutes: float
    kept: bool | None
    curve: list[dict[str, Any]]
    """Held-out KL and perplexity against tokens and minutes, on fitness text."""


def main() -> None:
    """Print what was asked for as Markdown; the table is also written as JSON."""
    arguments = _arguments()
    if arguments.peak:
        print(json.dumps(_peak_here(*arguments.peak)))
    elif arguments.memory:
        _memory()
    elif arguments.speed:
        _speed(arguments)
    else:
        _table(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    add_texts(parser, "distillation.json")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--max-tokens", type=int, default=500_000)
    parser.add_argument("--fitness", type=int, default=16, help="windows that training watches")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--refit", action="store_true", help="refit block by block first")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="with --speed, in a round")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _table(arguments: argparse.Namespace) -> None:
    table = Table(HEADER, _line, arguments.json)
    with tempfile.TemporaryDirectory() as scratch:
        for sparsity in arguments.sparsity:
            table.add(
                _row(arguments, sparsity, name, Path(scratch) / f"{sparsity:g}")
                for name in arguments.methods
            )


def _row(arguments: argparse.Namespace, sparsity: float, name: str, scratch: Path) -> Row:
    stages: list[dict[str, Any]] = [{"stage": "prune", "sparsity": sparsity, "round_to": 16}]
    if arguments.refit:
        stages.append({"stage": "refit"})
    settings = METHODS[name]
    if settings is not None:
        training = {
            "learning_rate": arguments.learning_rate,
            "per_device_train_batch_size": arguments.batch_size,
        }
        common = {"stage": "distill", "max_tokens": arguments.max_tokens, "training": training}
        stages.append({**common, **settings})
    raw = recipe_of(arguments, stages, scratch).model_dump(mode="json")
    raw["data"]["num_fitness_samples"] = arguments.fitness
    output = pipeline.run(parse_recipe(raw))
    metrics = load_metrics(output / "metrics.json")
    trained = metrics.distillation
    report = output.with_name(output.name + ".work") / "distill" / "report.json"
    return Row(
        sparsity=sparsity,
        method=name,
        kl=metrics.comparison.kl,
        tokens=trained.tokens if trained else 0,
        minutes=trained.minutes if trained else 0.0,
        kept=trained.kept if trained else None,
        curve=json.loads(report.read_text("utf-8"))["curve"] if trained else [],
        window_nll_before=metrics.comparison.window_nll_before,
        window_nll=metrics.comparison.window_nll,
    )


def _line(row: Row, below: Row | None) -> str:
    kept = {True: "yes", False: "no", None: ""}[row.kept]
    return (
        f"| {row.sparsity:.0%} | {row.method} | {row.perplexity:.2f} | {row.ratio} | {row.kl:.3f} "
        f"| {row.margin(below)} | {row.tokens:,} | {row.minutes:.1f} | {kept} |"
    )


def _memory() -> None:
    """Peak of one loss and its gradients, each in a process of its own."""
    print(f"| vocabulary | chunked, MB | textbook, MB | ({TOKENS} tokens, {WIDTH} channels) |")
    print("|---|---|---|---|")
    for vocabulary in VOCABULARIES:
        peaks = []
        for which in ("chunked", "textbook"):
            command = [sys.executable, "-m", "benchmarks.distillation", "--peak", which]
            run = subprocess.run(
                [*command, str(vocabulary)], capture_output=True, text=True, check=True
            )
            peaks.append(json.loads(run.stdout.splitlines()[-1]))
        print(f"| {vocabulary:,} | {peaks[0] / 1e6:,.0f} | {peaks[1] / 1e6:,.0f} | |", flush=True)


def _peak_here(which: str, vocabulary: str) -> int:
    """Bytes that the loss and its gradients add at peak to inputs, heads and gradients' places."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device) / shape[-1] ** 0.5

    hidden_TD, taught_TD = normal(TOKENS, WIDTH).requires_grad_(), normal(TOKENS, WIDTH)
    weight_VD, teacher_VD = (
        normal(int(vocabulary), WIDTH).requires_grad_(),
        normal(int(vocabulary), WIDTH),
    )
    functional.linear(hidden_TD[:8], weight_VD[:8]).sum().backward()  # the libraries' own buffers
    hidden_TD.grad = weight_VD.grad = None
    start = _reset_peak(device)
    if which == "chunked":
        divergence = teacher_loss(taught_TD, Head(teacher_VD), Objective())
        loss = fused_loss(hidden_TD, Head(weight_VD), divergence)
    else:
        with torch.no_grad():
            log_p = functional.log_softmax(functional.linear(taught_TD, teacher_VD), -1)
        log_q = functional.log_softmax(functional.linear(hidden_TD, weight_VD), -1)
        loss = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (loss / TOKENS).backward()
    return _peak(device) - start


def _reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None  # Linux says both
    return int(found[1]) * 1024


def _speed(arguments: argparse.Namespace) -> None:
    """Both kinds of step in turns, on the dense model as its own student: its size is what
    counts. Medians of the rounds."""
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    student = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    vocabulary, length = student.config.vocab_size, arguments.max_seq_length
    num = arguments.batch_size * arguments.steps
    ids_NL = torch.randint(vocabulary, (num, length), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {"ours": [], "plain and teacher": []}
    with tempfile.TemporaryDirectory() as scratch:
        for round_number in range(ROUNDS + 1):
            taken = {
                "ours": _trained(_ours(arguments, student, teacher, ids_NL, scratch)),
                "plain and teacher": _trained(_plain(arguments, student, ids_NL, scratch))
                + _passed(arguments, teacher, ids_NL),
            }
            if round_number:  # the first one warms up
                for name, value in taken.items():
                    seconds[name].append(value)
    rates = {name: ids_NL.numel() / median(values) for name, values in seconds.items()}
    print("| step | tokens per second |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    print(f"ours takes {rates['plain and teacher'] / rates['ours'] - 1:+.1%} of time more")


def _training(arguments: argparse.Namespace, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=0.0,
        save_strategy="no",
        report_to="none",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _ours(
    arguments: argparse.Namespace,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids_NL: torch.Tensor,
    scratch: str,
) -> Trainer:
    settings = _training(arguments, scratch)
    return DistillationTrainer(
        copy.deepcopy(student), teacher, settings, train_dataset=WindowDataset(ids_NL)
    )


def _plain(
    arguments: argparse.Namespace, student: PreTrainedModel, ids_NL: torch.Tensor, scratch: str
) -> Trainer:
    settings = _training(arguments, scratch)
    return Trainer(copy.deepcopy(student), settings, train_dataset=WindowDataset(ids_NL))


def _trained(trainer: Trainer) -> float:
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


@torch.no_grad()
def _passed(arguments: argparse.Namespace, teacher: PreTrainedModel, ids_NL: torch.Tensor) -> float:
    start = time.perf_counter()
    for ids_BL in ids_NL.split(arguments.batch_size):
        teacher(ids_BL.to(teacher.device), use_cache=False)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
