"""A tiny model with the statistics that a search starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_compress.calibration import calibrate
from hf_compress.model.blocks import ModelInMemory
from hf_compress.recipe import Prune
from hf_compress.search.costs import Costs, count_costs
from hf_compress.search.database import Database, build_database
from hf_compress.search.space import Space
from hf_compress.statistics import Statistics
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

BUDGET = {"non_embedding_parameters": 0.7}
STRUCTURES = ("mlp_neurons", "kv_groups", "attention_sublayers", "mlp_sublayers")


@dataclass
class Ready:
    """What a search has before it begins."""

    model: PreTrainedModel
    source: ModelInMemory
    statistics: Statistics
    space: Space
    costs: Costs
    database: Database


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("search")
    model = tiny_model("llama", num_hidden_layers=3)
    source = ModelInMemory(model)
    for name in ("statistics", "errors"):
        (folder / name).mkdir()
    calibrate(source, random_ids(32, 32), folder / "statistics")
    statistics = Statistics(folder / "statistics")
    space = Space.of(model.config, STRUCTURES, 16)
    costs = count_costs(model.config, space, torch.float32, 32)
    settings = Prune(sparsity=0.5)
    build_database(source, statistics, space, settings, folder / "errors")
    weights: Path = folder / "weights"
    database = Database(source, statistics, space, settings, folder / "errors", weights)
    return Ready(model, source, statistics, space, costs, database)


@pytest.fixture
def searching(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe that searches over the layers of a model with five of them."""
    folder = tmp_path / "model"
    tiny_model("llama", num_hidden_layers=5).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    search = {
        "stage": "search",
        "budget": BUDGET,
        "uniform": False,
        "round_to": 16,
        "generations": 3,
        "offspring": 4,
    }
    recipe["data"]["num_fitness_samples"] = 16
    return {**recipe, "model": str(folder), "stages": [search, {"stage": "prune"}]}
