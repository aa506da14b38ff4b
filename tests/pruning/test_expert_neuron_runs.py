"""Neurons inside experts: widths under a sparsity, plans, and whole runs on tiny mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hf_compress.pipeline as pipeline
from hf_compress import compress
from hf_compress.dry_run import describe
from hf_compress.errors import PlanError, RecipeError
from hf_compress.heterogeneous.config import check_plan
from hf_compress.model.blocks import meta_model
from hf_compress.model.parameters import count_parameters
from hf_compress.plan import load_plan, save_plan
from hf_compress.pruning import candidate_plans
from hf_compress.pruning.templates import planned_config
from hf_compress.recipe import Prune, parse_recipe
from tests.pruning.test_expert_neurons import plan_of
from tests.tiny import MIXTURES, random_ids, tiny_model, tiny_tokenizer

STRUCTURES = (
    ["expert_neurons"],
    ["expert_neurons", "kv_groups"],
    ["expert_neurons", "layers"],
    ["expert_neurons", "experts"],
)


@pytest.mark.parametrize("structures", STRUCTURES, ids=" ".join)
@pytest.mark.parametrize("variant", MIXTURES)
def test_never_less_is_removed_than_asked_and_no_more_than_rounding_makes_it(
    variant: str, structures: list[str]
) -> None:
    config = tiny_model(variant, num_hidden_layers=6).config
    before = count_parameters(meta_model(config, torch.float32)).non_embedding
    for plan in candidate_plans(config, Prune(structures=structures, sparsity=0.25, round_to=8)):
        widths, count = plan.widths, len(plan.layers)
        assert widths.intermediate_size % 8 == 0
        gone = []
        for kept in (range(count), range(6 - count, 6)):
            chosen = plan.model_copy(update={"kept_layers": list(kept)})
            check_plan(config, chosen)
            after = count_parameters(meta_model(planned_config(config, chosen), torch.float32))
            gone.append(1 - after.non_embedding / before)
        assert min(gone) >= 0.25
        if structures == ["expert_neurons"]:
            wider = plan_of(tiny_model(variant, num_hidden_layers=6), widths.intermediate_size + 8)
            after = count_parameters(meta_model(planned_config(config, wider), torch.float32))
            assert 1 - after.non_embedding / before < 0.25


def test_a_plan_of_experts_survives_its_file_and_is_checked(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    plan = plan_of(model, 64, experts=4)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    check_plan(model.config, plan)
    config = planned_config(model.config, plan)
    assert (config.moe_intermediate_size, config.num_experts) == (64, 4)
    assert (
        planned_config(tiny_model("gpt_oss").config, plan_of(tiny_model("gpt_oss"), 64)) is not None
    )
    for bad, words in (
        (plan_of(model, 60), "experts of 60 neurons.*multiple of 8"),
        (plan_of(model, 97), "intermediate_size=97, but the model has only 96"),
        (plan_of(model, 64, experts=7), "num_experts=7, but the model has 6.*from 2 to 6"),
        (plan_of(model, 64, experts=1), "a token takes 2"),
    ):
        with pytest.raises(PlanError, match=words):
            check_plan(model.config, bad)
    llama = tiny_model("llama")
    with pytest.raises(PlanError, match="has no experts"):
        check_plan(llama.config, plan_of(llama, 64, experts=4))


@pytest.fixture
def mixture(recipe: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest):
    """A recipe for a tiny mixture on disk, in several shards."""
    folder = tmp_path / "mixture"
    tiny_model(request.param).save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    stage = {
        "stage": "prune",
        "sparsity": 0.3,
        "round_to": 8,
        "structures": ["expert_neurons", "kv_groups"],
    }
    return {**recipe, "model": str(folder), "stages": [stage]}


@torch.no_grad()
def generated(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None):
    """The last logits of a prompt, read at once and token by token through the cache."""
    at_once = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    cache = DynamicCache(config=model.config)
    for position in range(ids.shape[1]):
        seen = None if mask is None else mask[:, : position + 1]
        step = model(
            ids[:, position : position + 1],
            attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
        )
    return at_once, step.logits[:, -1]


@pytest.mark.parametrize("mixture", MIXTURES, indirect=True)
def test_a_whole_run_streamed_and_in_memory(mixture: dict[str, Any], tmp_path: Path) -> None:
    output = pipeline.run(parse_recipe(mixture))
    dense = AutoConfig.from_pretrained(mixture["model"])
    pruned = AutoModelForCausalLM.from_pretrained(output)
    metrics = json.loads((output / "metrics.json").read_text())
    # Loaded in a fresh process: the same logits, and text generated with the cache.
    assert metrics["verification"]["relative_logit_error"] <= 1e-4
    assert metrics["verification"]["generated_tokens"] > 0
    assert metrics["after"]["parameters"] == pruned.num_parameters()
    planned = planned_config(dense, load_plan(output / "plan.json"))
    assert count_parameters(meta_model(planned, torch.float32)).total == pruned.num_parameters()
    assert metrics["pruning"]["sparsity_achieved"] >= 0.3
    layer = metrics["layers"][1]
    width = layer["intermediate_size"]
    assert width < 96 and width % 8 == 0
    assert (layer["num_experts"], layer["num_experts_before"]) == (6, 6)
    assert layer["mlp_error"] <= layer["mlp_error_without_fold"]
    assert 0 <= layer["experts_not_folded"] <= 6
    assert layer["experts_with_few_tokens"] is not None
    candidates = metrics["pruning"]["candidates"]
    if candidates:  # fewer groups do not always make room for eight more neurons
        assert [one["intermediate_size"] for one in candidates if one["chosen"]] == [width]
    card = (output / "README.md").read_text()
    assert f"| Neurons of each expert | 96 | {width} |" in card
    assert f"Each expert keeps {width} of 96 neurons" in card
    ids = random_ids(2, 12, seed=7)
    torch.testing.assert_close(*generated(pruned, ids), rtol=1e-4, atol=1e-4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        left = pruned(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(left, pruned(ids).logits, rtol=1e-4, atol=1e-4)
    pruned.save_pretrained(tmp_path / "stock")
    ours, stock = (load_file(one / "model.safetensors") for one in (output, tmp_path / "stock"))
    assert ours.keys() == stock.keys()
    assert all(torch.equal(value, stock[name]) for name, value in ours.items())
    model = AutoModelForCausalLM.from_pretrained(mixture["model"], dtype="auto")
    compress(model, tiny_tokenizer(), {**mixture, "output": str(tmp_path / "memory")})
    for path in output.with_name("out.work").joinpath("prune").glob("*.safetensors"):
        other = load_file(tmp_path / "memory.work" / "prune" / path.name)
        assert all(torch.equal(value, other[name]) for name, value in load_file(path).items())


@pytest.mark.parametrize("how", ["drop", "merge"])
@pytest.mark.parametrize("mixture", ["mixtral", "qwen3_moe-dense-first"], indirect=True)
def test_experts_and_the_neurons_of_those_that_stay_may_go_together(
    mixture: dict[str, Any], how: str
) -> None:
    mixture["stages"][0] |= {"structures": ["expert_neurons", "experts"], "experts": how}
    output = pipeline.run(parse_recipe(mixture))
    metrics = json.loads((output / "metrics.json").read_text())
    candidates = metrics["pruning"]["candidates"]
    shapes = {(one["num_experts"], one["intermediate_size"]) for one in candidates}
    assert len({experts for experts, _ in shapes}) > 1
    assert len({width for _, width in shapes}) > 1
    pruned = AutoModelForCausalLM.from_pretrained(output)
    assert metrics["after"]["parameters"] == pruned.num_parameters()
    assert metrics["verification"]["relative_logit_error"] <= 1e-4
    # Both at once, by a plan, as the comparison may have chosen one of them only.
    plan = load_plan(output / "plan.json")
    layer = plan.layers[0].model_copy(update={"num_experts": 4, "intermediate_size": 72})
    path = output.with_name("mine.json")
    save_plan(plan.model_copy(update={"layers": [layer] * 2}), path)
    stage = {**mixture["stages"][0], "plan": str(path)}
    del stage["sparsity"]
    again = {**mixture, "output": str(output.with_name("both")), "stages": [stage]}
    output = pipeline.run(parse_recipe(again))
    layer = json.loads((output / "metrics.json").read_text())["layers"][1]
    assert (layer["num_experts"], layer["intermediate_size"]) == (4, 72)
    assert layer["routed_share_removed"] > 0
    assert 0 < layer["mlp_error"] <= layer["mlp_error_without_fold"]


@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
def test_the_dry_run_names_widths_and_memory(mixture: dict[str, Any]) -> None:
    mixture["stages"][0] |= {"structures": ["expert_neurons"], "round_to": 8}
    lines = describe(parse_recipe(mixture))
    assert any("3 KV groups, 6 experts of 64 neurons" in line for line in lines)
    assert any("GB of it for the neurons of a layer's experts" in line for line in lines)


@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"round_to": 2}, "round_to 2 .*multiple of 8"),
        ({"recollect": False}, "set recollect to true"),
        (
            {"structures": ["expert_neurons", "mlp_neurons"]},
            r"inside its experts.*\[expert_neurons",
        ),
        ({"structures": ["expert_neurons", "residual_channels"]}, "residual_channels"),
        ({"structures": ["expert_neurons"], "sparsity": 0.97}, r"at most 0\.\d+"),
        ({"ignore": ["model.layers.0.mlp"]}, "the mlp of layer 0.*expert_neurons"),
    ],
)
def test_bad_recipes_are_one_clear_error(
    mixture: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    mixture["stages"][0] |= change
    with pytest.raises(RecipeError, match=words):
        describe(parse_recipe(mixture))


def test_a_model_without_experts_has_no_neurons_in_them(recipe: dict[str, Any]) -> None:
    recipe["stages"][0]["structures"] = ["expert_neurons"]
    with pytest.raises(RecipeError, match="llama has no experts; leave expert_neurons out"):
        describe(parse_recipe(recipe))
