"""Peak memory of calibrating and pruning: `python -m benchmarks.memory RECIPE` (Linux).

What counts is what the two stages add to a process that has imported everything and cut its
text into windows. It is compared with the model's weights, one block's Gram matrices and
the cached hidden states (of both streams, where the dense model runs beside) together.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import torch

from benchmarks.table import job_of
from hf_compress.model.surgery import Dimensions
from hf_compress.recipe import Prune, Quantize, Sparsify, load_recipe
from hf_compress.statistics import GramPair
from hf_compress.subject import Subject

PROCESS = Path("/proc/self")


def main() -> None:
    """Print the peak, what is allowed, and the parts of it, in MB."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="recipes/smollm2-obs20.yaml")
    parser.add_argument("--set", action="append", default=[], help="override a key of the recipe")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [*arguments.set, f"output={scratch}/run"]
        recipe = load_recipe(arguments.recipe, overrides)
        job = job_of(recipe)
        subject = job.subject
        windows = job.windows(None, None)
        torch.ones(512, 512) @ torch.ones(512, 512)  # the libraries' own buffers
        PROCESS.joinpath("clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        before = _status("VmRSS")
        job.compress(windows)
        added = _status("VmHWM") - before
    corrects = any(
        isinstance(stage, Prune | Quantize | Sparsify) and stage.corrects for stage in recipe.stages
    )
    streams = 2 if corrects else 1
    parts = _parts(subject, streams * windows["calibration"].numel())
    for name, size in parts.items():
        print(f"{name:<28}{size / 1e6:8.0f} MB")
    print(f"{'together':<28}{sum(parts.values()) / 1e6:8.0f} MB")
    print(f"{'added by the stages, at peak':<28}{added / 1e6:8.0f} MB")


def _parts(subject: Subject, num_tokens: int) -> dict[str, int]:
    source = subject.source
    config, device = source.config, torch.device("meta")
    dims = Dimensions.of(config)
    attention = dims.num_key_value_heads * dims.group_width
    pairs = [GramPair.zeros(width, device) for width in (attention, config.intermediate_size)]
    grams = sum(pair.first_II.nbytes + pair.second_II.nbytes for pair in pairs)
    shards = Path(str(subject.folder)).glob("*.safetensors")
    return {
        "weights of the model": sum(path.stat().st_size for path in shards),
        "Gram matrices of one block": grams,
        "cached hidden states": num_tokens * config.hidden_size * source.dtype.itemsize,
    }


def _status(key: str) -> int:
    """Bytes that the kernel states for this process."""
    status = PROCESS.joinpath("status").read_text(encoding="utf-8")
    found = re.search(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    main()
