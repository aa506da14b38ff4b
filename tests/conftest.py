"""What several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer on disk, in several shards."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe for the tiny checkpoint, to be changed by a test."""
    for name, seed in (("calibration", 1), ("evaluation", 2)):
        (tmp_path / f"{name}.txt").write_text(tiny_text(4000, seed))
    windows = {"max_seq_length": 32}
    return {
        "model": str(checkpoint),
        "output": str(tmp_path / "out"),
        "data": {
            "calibration": {
                "source": str(tmp_path / "calibration.txt"),
                "num_samples": 64,
                **windows,
            },
            "evaluation": {
                "source": str(tmp_path / "evaluation.txt"),
                "num_samples": 8,
                **windows,
            },
            "num_fitness_samples": 4,
        },
        "stages": [{"stage": "prune", "sparsity": 0.3, "round_to": 8}],
        "evaluate": {"speed": False},
    }
