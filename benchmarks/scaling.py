"""How the time to prune grows with layers and with tokens: `python -m benchmarks.scaling`.

Random Llamas from a configuration, no checkpoint needed. Each size is pruned through the whole
stage (calibrate, compare splits, cut and fold); what is printed is its seconds, and those per
layer and per thousand tokens, which stay the same where time is linear.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compress.model.blocks import ModelInMemory
from hf_compress.pipeline import Job
from hf_compress.recipe import parse_recipe
from hf_compress.stages import read_note
from hf_compress.subject import Subject
from hf_compress.workspace import Workspace, digest_model

LAYERS = (4, 8, 16, 32)
TOKENS = (8_192, 16_384, 32_768, 65_536)
LENGTH = 256
"""Tokens in a window."""
PARTS = ("calibrate", "compare splits", "prune")
HEADER = "| layers | tokens | seconds | ms a layer and thousand tokens |"


def main() -> None:
    """Print both series as Markdown and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/scaling.json"))
    arguments = parser.parse_args()
    sizes = [(layers, TOKENS[1]) for layers in LAYERS] + [(LAYERS[1], each) for each in TOKENS]
    print(HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|", flush=True)
    _seconds(arguments.hidden_size, 2, TOKENS[0])  # warms up
    rows: list[dict[str, Any]] = []
    for layers, tokens in sizes:
        seconds = _seconds(arguments.hidden_size, layers, tokens)
        rows.append({"layers": layers, "tokens": tokens, "seconds": seconds})
        each = 1e3 * seconds / layers / (tokens / 1e3)
        print(f"| {layers} | {tokens:,} | {seconds:.1f} | {each:.1f} |", flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _seconds(hidden_size: int, layers: int, tokens: int) -> float:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = parse_recipe(
            {
                "model": "random",
                "output": f"{scratch}/out",
                "stages": [{"stage": "prune", "sparsity": 0.3, "round_to": 16}],
            }
        )
        subject = _RandomSubject(ModelInMemory(model), None, digest_model(model), "random", None)
        job = Job(recipe, subject, Workspace(Path(scratch) / "work"))
        windows = {
            "calibration": torch.randint(5, 1024, (tokens // LENGTH, LENGTH)),
            "fitness": torch.randint(5, 1024, (4, LENGTH)),
        }
        note = read_note(job.compress(windows)[-1])
    return sum(note.get(part, 0.0) for part in PARTS)


class _RandomSubject(Subject):
    """Without a tokenizer."""

    def save_companions(self, folder: Path) -> None:
        pass


if __name__ == "__main__":
    main()
