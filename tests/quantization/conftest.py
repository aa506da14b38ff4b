"""Runs that several tests look at: each costs a fresh process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_compress.pipeline as pipeline
from hf_compress.recipe import parse_recipe
from tests.tiny import WIDE, tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture(scope="session")
def make_wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny Llama in bfloat16 whose rows fill whole blocks, with changes to its config."""

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("model") / "wide"
        tiny_model(**WIDE, **changes).bfloat16().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def wide(make_wide: Callable[..., Path]) -> Path:
    return make_wide()


@pytest.fixture(scope="session")
def quantized_once(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Output of a run with one stage `quantize` of these settings; the same at every call."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(tiny_text(4000, 1))
    text = {"source": str(folder / "text.txt"), "max_seq_length": 32}
    done: dict[str, Path] = {}

    def run(model: Path = wide, **settings: Any) -> Path:
        key = json.dumps([str(model), settings], sort_keys=True)
        if key not in done:
            recipe = {
                "model": str(model),
                "output": str(folder / str(len(done))),
                "data": {
                    "calibration": {**text, "num_samples": 64},
                    "evaluation": {**text, "num_samples": 4},
                    "num_fitness_samples": 4,
                },
                "stages": [{"stage": "quantize", **settings}],
                "evaluate": {"speed": False},
            }
            done[key] = pipeline.run(parse_recipe(recipe))
        return done[key]

    return run
