"""The main job on the real model, at small size."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_compress import pipeline
from hf_compress.recipe import parse_recipe
from hf_compress.report import load_metrics

MODEL = Path(__file__).parents[1] / ".cache" / "smollm2-135m"


@pytest.mark.real_model
def test_smollm2_loses_a_tenth_and_keeps_its_language(tmp_path: Path) -> None:
    if not MODEL.is_dir():
        pytest.skip("run `make test`, which prepares the model")
    recipe = {
        "model": str(MODEL),
        "output": str(tmp_path / "out"),
        "data": {
            "calibration": {
                "source": "python-docs",
                "num_samples": 64,
                "max_seq_length": 256,
            },
            "evaluation": {"source": "python-docs", "num_samples": 8, "max_seq_length": 256},
            "num_fitness_samples": 4,
        },
        "stages": [{"stage": "prune", "sparsity": 0.1}],
        "evaluate": {"speed": False},
    }
    metrics = load_metrics(pipeline.run(parse_recipe(recipe)) / "metrics.json")
    assert metrics.pruning is not None
    assert metrics.pruning.sparsity_achieved >= 0.1
    assert 1 < metrics.perplexity_ratio < 1.35
    folded = [layer for layer in metrics.layers if layer.mlp_error_without_fold is not None]
    assert len(folded) == 30
    assert all(layer.mlp_error <= layer.mlp_error_without_fold for layer in folded)
