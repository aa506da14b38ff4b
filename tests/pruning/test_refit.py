"""Refitting block by block: what it must not change, what it must improve, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hf_compress.pipeline as pipeline
from hf_compress.block_learning import LearningReport
from hf_compress.errors import ModelError, RecipeError
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.walk import Walk
from hf_compress.pruning.refit import refit_block
from hf_compress.recipe import Refit, parse_recipe
from tests.tiny import VARIANTS, random_ids, tiny_model


def refit_first(
    source: ModelInMemory, block: nn.Module, **settings: Any
) -> tuple[nn.Module, LearningReport]:
    """Refit a stand-in for the first block of a model."""
    # A window at a time, as in a step: beside other tokens an expert may round differently, and
    # Adam takes a rounding error for a direction.
    walk, beside = (Walk(source, random_ids(12, 16), 1) for _ in range(2))
    with source.block(0) as dense:
        beside.advance(dense, 0)
        return refit_block(block, dense, 0, walk, beside, Refit(**settings))


def damaged(source: ModelInMemory) -> nn.Module:
    """The first block with a part of its weights gone."""
    other = ModelInMemory(tiny_model(source.config.model_type))
    block = other.model.get_submodule(f"{other.family.layers}.0")
    name, dim = f"{other.family.mlp_output}.weight", 1
    if other.family.experts:
        name = "mlp.experts.down_proj"
        dim = other.family.experts.parameters[name].dim
    with torch.no_grad():
        block.get_parameter(name).index_fill_(dim, torch.arange(0, 48, 3), 0)
    return block


@pytest.mark.parametrize("variant", VARIANTS)
def test_refitting_an_uncut_block_changes_nothing(variant: str) -> None:
    source = ModelInMemory(tiny_model(variant))
    block = source.model.get_submodule(f"{source.family.layers}.0")
    learned, report = refit_first(source, block)
    assert report.error_first < 1e-10
    before, after = block.state_dict(), learned.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.allclose(value, after[name], rtol=0, atol=1e-3), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_damaged_block_learns_and_its_zeros_stay(variant: str) -> None:
    if "-" in variant:
        pytest.skip("the damaged block is made from the plain configuration of a family")
    source = ModelInMemory(tiny_model(variant))
    block = damaged(source)
    learned, report = refit_first(source, block, epochs=16, batch_size=4)
    assert report.error_last < 0.8 * report.error_first
    for name, value in block.state_dict().items():
        new = learned.state_dict()[name]
        assert new.dtype == value.dtype
        if value.dim() > 1:
            assert (new[value == 0] == 0).all(), name
    assert not any(parameter.requires_grad for parameter in learned.parameters())


def test_a_learning_rate_that_diverges_is_one_clear_error() -> None:
    source = ModelInMemory(tiny_model())
    with pytest.raises(ModelError, match=r"block 0 diverged.*learning_rate, which is 1e\+30"):
        refit_first(source, damaged(source), learning_rate=1e30)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def test_a_whole_run_keeps_what_lowers_kl(recipe: dict[str, Any]) -> None:
    recipe["stages"].append({"stage": "refit", "epochs": 4, "batch_size": 4})
    output = pipeline.run(parse_recipe(recipe))
    work = output.with_name("out.work")
    report = json.loads((work / "refit" / "report.json").read_text())
    assert report["kept"] and report["kl_after"][0] < report["kl_before"][0]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["refit"]["kept"]
    assert metrics["refit"]["kl_after"] == report["kl_after"][0]
    assert metrics["seconds"]["refit"] > 0
    assert "Refitted" in (output / "README.md").read_text()
    found, final = weights(work / "prune"), weights(output)
    assert found.keys() == final.keys()
    assert any(not torch.equal(found[name], final[name]) for name in found)
    assert (output / "plan.json").read_text() == (work / "prune" / "plan.json").read_text()


def test_a_refit_that_gains_nothing_is_not_kept(recipe: dict[str, Any]) -> None:
    recipe["stages"].append({"stage": "refit", "epochs": 1, "learning_rate": 1e-9})
    output = pipeline.run(parse_recipe(recipe))
    found, final = weights(output.with_name("out.work") / "prune"), weights(output)
    assert all(torch.equal(found[name], final[name]) for name in found)
    metrics = json.loads((output / "metrics.json").read_text())
    assert not metrics["refit"]["kept"]
    assert "not kept" in (output / "README.md").read_text()


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-9])
def test_a_refit_where_layers_are_gone(recipe: dict[str, Any], learning_rate: float) -> None:
    recipe["stages"][0] |= {"structures": ["layers"], "ignore": ["model.layers.1"]}
    recipe["stages"].append({"stage": "refit", "epochs": 4, "learning_rate": learning_rate})
    output = pipeline.run(parse_recipe(recipe))
    work = output.with_name("out.work")
    report = json.loads((work / "refit" / "report.json").read_text())
    metrics = json.loads((output / "metrics.json").read_text())
    dropped = [at["layer"] for at in metrics["layers"] if not at["intermediate_size"]]
    assert len(report["layers"]) == len(dropped) == 1
    # Before: what choosing the layer measured, on the same windows.
    (drop,) = json.loads((work / "prune" / "report.json").read_text())["dropped_layers"]
    assert dropped == [drop["layer"]] == [0]
    assert report["kl_before"][0] == pytest.approx(drop["kl"], rel=1e-4)
    assert report["kept"] == (learning_rate == 1e-3)


def test_a_dense_model_needs_no_refit(recipe: dict[str, Any]) -> None:
    recipe["stages"].insert(0, {"stage": "refit"})
    with pytest.raises(RecipeError, match="first stage is `refit`"):
        pipeline.run(parse_recipe(recipe))
