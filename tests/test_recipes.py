"""Every recipe that ships validates, and what a recipe may not say is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hf_compress.dry_run import describe
from hf_compress.errors import RecipeError
from hf_compress.recipe import dump_recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_validates_and_round_trips(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_there_is_a_demo_recipe() -> None:
    assert "demo.yaml" in [path.name for path in RECIPES]


def test_overrides_reach_into_lists() -> None:
    recipe = load_recipe(ROOT / "recipes/demo.yaml", ["stages.0.sparsity=0.35", "seed=7"])
    assert (recipe.stages[0].sparsity, recipe.seed) == (0.35, 7)


@pytest.mark.parametrize("override", ["stages.4.sparsity=0.3", "seed", "stages.x.sparsity=1"])
def test_an_override_of_nothing_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(override)):
        load_recipe(ROOT / "recipes/demo.yaml", [override])


def test_a_dry_run_tells_sizes_without_weights(recipe: dict, checkpoint: Path) -> None:
    weights = next(checkpoint.glob("*.safetensors"))
    hidden = weights.rename(weights.with_suffix(".away"))
    try:
        lines = "\n".join(describe(parse_recipe(recipe)))
    finally:
        hidden.rename(weights)
    assert re.search(r"KV groups, \d+ neurons: [\d,]+ parameters", lines)
    assert "memory" in lines
    assert "time" in lines


def test_the_dry_run_shows_layers_and_query_heads(recipe: dict) -> None:
    structures = ["mlp_neurons", "kv_groups", "query_heads", "layers"]
    recipe["stages"][0] |= {"structures": structures, "sparsity": 0.2}
    recipe["stages"].append({**recipe["stages"][0], "structures": ["layers"], "sparsity": 0.1})
    lines = "\n".join(describe(parse_recipe(recipe)))
    assert "2 layers, 3 KV groups, all query heads in each, 64 neurons: " in lines
    assert "1 layers, 3 KV groups, all query heads in each, 96 neurons: " in lines
    assert "2 layers, 3 KV groups, 1 query heads in each, 80 neurons: " in lines
    assert "to choose 1 of 2 layers costs at most 6 passes over the fitness text" in lines
