"""Experts: how they are ranked, dropped and merged, and whole runs on tiny mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_compress.pipeline as pipeline
from hf_compress import compress
from hf_compress.calibration import collect_experts
from hf_compress.calibration.experts import outputs
from hf_compress.dry_run import describe
from hf_compress.errors import ModelError, RecipeError
from hf_compress.inspection import inspect_model
from hf_compress.model.blocks import ModelInMemory, attention_half, mlp_half
from hf_compress.model.divergence import compare
from hf_compress.model.experts import take_neurons
from hf_compress.model.families import FAMILIES
from hf_compress.model.walk import Walk, captured_input
from hf_compress.plan import Plan
from hf_compress.pruning import Templates, candidate_plans, prune_blocks
from hf_compress.pruning.experts import EXPERT_CRITERIA, ExpertLayer, merge_order, nearest
from hf_compress.pruning.streams import Streams
from hf_compress.recipe import Prune, parse_recipe
from hf_compress.statistics import ExpertMoments
from tests.tiny import MIXTURES, random_ids, tiny_model, tiny_tokenizer

SETTINGS = {"sparsity": 0.3, "structures": ["experts"]}


def moments_of(model: PreTrainedModel, index: int = 1) -> tuple[ExpertMoments, Any]:
    """Moments of one layer's experts, and what the layer calls its experts with."""
    source = ModelInMemory(model)
    walk = Walk(source, random_ids(6, 24), batch_size=2)
    calls: list[Any] = []
    name = source.family.experts.module
    for layer in range(index + 1):
        with source.block(layer) as block:
            walk.advance(attention_half(block, source.family), layer)
            half = mlp_half(block, source.family)
            if layer == index:
                with captured_input(half, name) as captured:
                    for hidden in walk.batches():
                        walk.run(half, layer, hidden)
                        calls.append(tuple(captured))
                return collect_experts(walk, half, layer, weighting="none"), (
                    half.get_submodule(name),
                    calls,
                )
            walk.advance(half, layer)
    raise AssertionError


@pytest.mark.parametrize("variant", MIXTURES)
def test_single_outputs_weighted_with_their_gates_are_the_layers_own(variant: str) -> None:
    _, (experts, calls) = moments_of(tiny_model(variant))
    for inputs, index, gates in calls:
        single = outputs(experts, inputs, index)
        whole = experts(inputs, index, gates)
        torch.testing.assert_close((single * gates[..., None]).sum(1), whole)


@pytest.mark.parametrize("variant", MIXTURES)
def test_moments_are_those_of_the_definition(variant: str) -> None:
    moments, (experts, calls) = moments_of(tiny_model(variant))
    tokens, mass, output = torch.zeros(3, 6, dtype=torch.float64)
    agreement = torch.zeros(6, 6, dtype=torch.float64)
    for inputs, index, gates in calls:
        for one, chosen, gate in zip(inputs, index, gates, strict=True):
            every = outputs(experts, one[None], torch.arange(6)[None])[0].double()
            agreement += every @ every.T
            for expert, weight in zip(chosen.tolist(), gate.tolist(), strict=True):
                tokens[expert] += 1
                mass[expert] += weight
                output[expert] += weight * every[expert].norm().item()
    assert torch.equal(moments.tokens_E, tokens)
    for found, expected in ((moments.mass_E, mass), (moments.output_E, output)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.agreement_EE, agreement, rtol=1e-4, atol=1e-3)


def test_every_criterion_ranks_by_what_it_says() -> None:
    moments = ExpertMoments(
        tokens_E=torch.tensor([10.0, 2.0, 0.0]),
        mass_E=torch.tensor([5.0, 1.0, 0.0]),
        output_E=torch.tensor([10.0, 8.0, 0.0]),
        agreement_EE=torch.eye(3),
    )
    energy = torch.tensor([1.0, 2.0, 3.0])
    order = {name: score(moments, energy).argsort().tolist() for name, score in scores()}
    assert order == {"reap": [2, 0, 1], "frequency": [2, 1, 0], "magnitude": [0, 1, 2]}


def scores() -> list[tuple[str, Any]]:
    return list(EXPERT_CRITERIA.items())


def test_of_two_that_do_the_same_only_one_is_merged_away() -> None:
    made = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]).double()
    score = torch.tensor([5.0, 5.0, 1.0, 2.0], dtype=torch.float64)
    order = merge_order(score, made @ made.T)
    assert order.tolist() == [0, 2, 3, 1]
    assert nearest(made @ made.T, torch.tensor([0]), torch.tensor([1, 2, 3])) == [1]


@pytest.mark.parametrize("variant", MIXTURES)
def test_an_expert_with_its_neurons_in_another_order_is_put_back_in_order(variant: str) -> None:
    model = tiny_model(variant)
    family = FAMILIES[model.config.model_type]
    block = model.get_submodule(f"{family.layers}.1")
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    before = {}
    with torch.no_grad():
        for name, axis in family.experts.parameters.items():
            value = block.get_parameter(name)
            before[name] = value[0].clone()
            taken = value[:1] if axis is None else take_neurons(value[:1], axis, shuffled[None])
            value[3] = taken[0]
    moments, _ = moments_of(model)
    layer = ExpertLayer.of(block, family.experts, moments, Prune(experts="merge", **SETTINGS))
    aligned = layer._aligned(3, 0)
    assert all(torch.equal(aligned[name], value) for name, value in before.items())


def plant(model: PreTrainedModel, noise: float) -> None:
    """Experts 3, 4, 5 become near-copies of 0, 1, 2, their neurons in another order, with
    similar rows in the router."""
    generator = torch.Generator().manual_seed(0)
    family = FAMILIES[model.config.model_type]
    for block in model.get_submodule(family.layers):
        names = (*family.experts.router, *family.experts.parameters)
        for name in names:
            value = block.get_parameter(name)
            if name in family.experts.router:
                value.mul_(3)
            axis = family.experts.parameters.get(name)
            order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
            for index in range(3):
                one = value[index : index + 1]
                copy = one if axis is None else take_neurons(one, axis, order[None])
                spread = noise * one.std() * torch.randn(one.shape, generator=generator)
                value[index + 3] = (copy + spread)[0]


def divergence(model: PreTrainedModel, **settings: Any) -> float:
    """KL to the model on fitness windows after half of its experts have gone."""
    source, prune = ModelInMemory(model), Prune(**SETTINGS, **settings)
    plan = Plan.uniform(model.config.model_type, 2, 96, 3, num_experts=3)
    calibration = Walk(source, random_ids(32, 32, 1))
    dense, pruned = (Walk(source, random_ids(16, 32, 2)) for _ in range(2))
    prune_blocks(
        source,
        None,
        plan,
        Templates(source, plan),
        prune,
        streams=Streams(
            calibration,
            None,
            lambda *_, **__: pytest.fail("no group is to go"),
            lambda half, index: collect_experts(calibration, half, index, weighting="inverse_norm"),
            lambda *_: pytest.fail("no neuron is to go"),
        ),
        probe=pruned,
        write=lambda *_: None,
    )
    for index in range(2):
        with source.block(index) as block:
            dense.advance(block, index)
    return compare(dense, [pruned], random_ids(16, 32, 2))[0].kl[0]


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "qwen2_moe"])
@torch.no_grad()
def test_merging_near_copies_changes_logits_less_than_dropping(variant: str) -> None:
    model = tiny_model(variant)
    plant(model, 0.3)
    merged, dropped = (divergence(model, experts=how) for how in ("merge", "drop"))
    assert merged < 0.7 * dropped
    random = {name: divergence(model, expert_criterion=name) for name in EXPERT_CRITERIA}
    assert all(merged < other for other in random.values())


@pytest.fixture
def mixture(recipe: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest):
    """A recipe for a tiny mixture on disk, in several shards."""
    folder = tmp_path / "mixture"
    tiny_model(request.param).save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    stage = {"stage": "prune", "sparsity": 0.3, "structures": ["experts", "kv_groups"]}
    return {**recipe, "model": str(folder), "stages": [stage]}


@pytest.mark.parametrize(
    ("mixture", "how"),
    [
        ("mixtral", "merge"),
        ("qwen2_moe", "drop"),
        ("qwen3_moe-dense-first", "drop"),
        ("gpt_oss", "merge"),
    ],
    indirect=["mixture"],
)
def test_a_whole_run_streamed_and_in_memory(
    mixture: dict[str, Any], how: str, tmp_path: Path
) -> None:
    mixture["stages"][0]["experts"] = how
    output = pipeline.run(parse_recipe(mixture))
    dense = AutoConfig.from_pretrained(mixture["model"])
    pruned = AutoModelForCausalLM.from_pretrained(output)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["after"]["parameters"] == pruned.num_parameters()
    assert metrics["pruning"]["sparsity_achieved"] >= 0.3
    assert metrics["verification"]["relative_logit_error"] <= 1e-4
    assert (dense.num_experts, pruned.config.num_experts) == (
        6,
        metrics["layers"][1]["num_experts"],
    )
    assert pruned.config.num_experts < 6
    assert 0 < metrics["layers"][1]["routed_share_removed"] < 1
    pruned.save_pretrained(tmp_path / "stock")
    ours, stock = (load_file(one / "model.safetensors") for one in (output, tmp_path / "stock"))
    assert ours.keys() == stock.keys()
    assert all(torch.equal(value, stock[name]) for name, value in ours.items())
    card = (output / "README.md").read_text()
    assert "| Experts, all layers |" in card
    assert ("merged into the nearest kept one" in card) == (how == "merge")
    model = AutoModelForCausalLM.from_pretrained(mixture["model"], dtype="auto")
    mixture["output"] = str(tmp_path / "memory")
    compress(model, tiny_tokenizer(), mixture)
    for step in ("calibrate", "prune"):
        for path in output.with_name("out.work").joinpath(step).glob("*.safetensors"):
            other = load_file(tmp_path / "memory.work" / step / path.name)
            for name, value in load_file(path).items():
                assert torch.equal(value, other[name]), (step, name)


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_experts_may_go_without_statistics_of_the_pruned_stream(mixture: dict[str, Any]) -> None:
    mixture["stages"][0] |= {"recollect": False, "experts": "merge"}
    pruned = AutoModelForCausalLM.from_pretrained(pipeline.run(parse_recipe(mixture)))
    assert pruned.config.num_experts < 6


@pytest.mark.parametrize("mixture", ["mixtral", "gpt_oss"], indirect=True)
def test_a_refit_of_experts_is_written_as_stock_would(
    mixture: dict[str, Any], tmp_path: Path
) -> None:
    mixture["stages"].append({"stage": "refit", "epochs": 2, "learning_rate": 1e-3})
    output = pipeline.run(parse_recipe(mixture))
    work = output.with_name("out.work")
    report = json.loads((work / "refit" / "report.json").read_text())
    assert report["kept"] and report["kl_after"][0] < report["kl_before"][0]
    AutoModelForCausalLM.from_pretrained(output).save_pretrained(tmp_path / "stock")
    found, ours, stock = (
        load_file(folder / "model.safetensors")
        for folder in (work / "prune", output, tmp_path / "stock")
    )
    assert found.keys() == ours.keys() == stock.keys()
    assert all(torch.equal(value, stock[name]) for name, value in ours.items())
    learned = [
        name for name in ours if "experts" in name and not torch.equal(ours[name], found[name])
    ]
    assert learned


@pytest.mark.parametrize("mixture", ["qwen3_moe-dense-first"], indirect=True)
def test_layers_of_a_mixture_may_go_with_its_experts(mixture: dict[str, Any]) -> None:
    mixture["stages"] = [
        {"stage": "prune", "sparsity": 0.1, "structures": ["layers"], "ignore": ["model.layers.1"]},
        {"stage": "prune", "sparsity": 0.2, "structures": ["experts"], "experts": "merge"},
    ]
    output = pipeline.run(parse_recipe(mixture))
    pruned = AutoModelForCausalLM.from_pretrained(output)
    assert (pruned.config.num_hidden_layers, pruned.config.mlp_only_layers) == (1, [])
    gone, cut = json.loads((output / "metrics.json").read_text())["layers"]
    assert (gone["intermediate_size_before"], gone["intermediate_size"]) == (80, 0)
    assert gone["num_experts_before"] is None
    assert (cut["num_experts_before"], cut["num_experts"]) == (6, pruned.config.num_experts)
    assert pruned.config.num_experts < 6


@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expert_criterion": "reep"}, "'reep'.*reap, frequency, magnitude"),
        ({"structures": ["mlp_neurons"]}, "inside its experts.*expert_neurons, kv_groups"),
        ({"sparsity": 0.9}, r"at most 0\.\d+ .*a token takes 2 experts"),
        ({"experts": "fuse"}, "'drop' or 'merge'"),
    ],
)
def test_bad_recipes_are_one_clear_error(
    mixture: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    mixture["stages"][0] |= change
    with pytest.raises(RecipeError, match=words):
        describe(parse_recipe(mixture))


def test_a_model_without_experts_has_none_to_lose(recipe: dict[str, Any]) -> None:
    recipe["stages"][0]["structures"] = ["experts"]
    with pytest.raises(RecipeError, match="llama has no experts"):
        describe(parse_recipe(recipe))


@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
def test_a_plan_names_experts(mixture: dict[str, Any]) -> None:
    lines = [line for line in describe(parse_recipe(mixture)) if " KV groups, " in line]
    assert len(lines) == 1  # fewer groups would not save an expert
    assert "3 KV groups, 4 experts of 96 neurons" in lines[0]


def test_never_fewer_experts_than_a_token_takes() -> None:
    config = tiny_model("qwen3_moe", num_experts_per_tok=4).config
    settings = Prune(sparsity=0.3, structures=["experts", "kv_groups"])
    plans = candidate_plans(config, settings)
    assert plans and min(plan.widths.num_experts for plan in plans) >= 4


def test_a_mixture_is_not_inspected() -> None:
    with pytest.raises(ModelError, match="mixtral is a mixture of experts"):
        inspect_model(ModelInMemory(tiny_model("mixtral")), random_ids(2, 16))
