"""Single weights: masks, criteria and refitting on one layer, and whole models."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compress.calibration import SublayerStreams, input_norms
from hf_compress.checkpoint import ShardWriter
from hf_compress.checkpoint.verify import TOLERANCE
from hf_compress.dry_run import describe
from hf_compress.errors import ModelError, RecipeError
from hf_compress.model.blocks import ModelInMemory, meta_model
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk, captured_input
from hf_compress.pipeline import run
from hf_compress.pruning.masks import Zeros
from hf_compress.pruning.ratios import (
    Shares,
    check_sparsify,
    global_shares,
    linear_names,
    owl_shares,
    uniform_shares,
)
from hf_compress.pruning.unstructured import sparsified, sparsify_blocks
from hf_compress.pruning.weights import WEIGHT_CRITERIA, refit
from hf_compress.recipe import Sparsify, dump_recipe, load_recipe, parse_recipe
from hf_compress.regression.curvature import Curvature
from hf_compress.report import load_metrics
from tests.tiny import MIXTURES, WITHOUT_EXPERTS, random_ids, tiny_model

PATTERNS = {"unstructured": 0.37, "2:4": 0.5, "4:8": 0.5, "1:4": 0.75, "5:6": 1 / 6}


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [40, 192] and inputs [192, 2000] with correlated columns of unlike size."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(192, 60, generator=generator)
    inputs = mixing @ torch.randn(60, 2000, generator=generator)
    inputs += torch.randn(192, 2000, generator=generator)
    inputs *= torch.rand(192, 1, generator=generator) + 0.1
    return torch.randn(40, 192, generator=generator), inputs


def settings(pattern: str = "unstructured", **changes: Any) -> Sparsify:
    share = {"sparsity": PATTERNS[pattern]} if pattern == "unstructured" else {}
    return Sparsify(pattern=pattern, **{**share, **changes})


@pytest.mark.parametrize("refitted", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_exactly_as_many_zeros_as_asked_and_where(
    criterion: str, pattern: str, refitted: bool, layer
) -> None:
    weight, inputs = layer
    zeros = Zeros.of(pattern, PATTERNS[pattern], weight)
    chosen = settings(pattern, criterion=criterion, refit=refitted)
    sparse = sparsified(weight, Curvature(inputs @ inputs.T), zeros, chosen)
    assert int((sparse == 0).sum()) == zeros.count == round(PATTERNS[pattern] * weight.numel())
    if zeros.group:
        groups = (sparse == 0).view(40, -1, zeros.group).sum(-1)
        assert groups.unique().tolist() == [zeros.removed]


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_no_sparsity_leaves_the_weights_bit_for_bit(criterion: str, layer) -> None:
    weight, inputs = layer
    zeros = Zeros.of("unstructured", 0.0, weight)
    chosen = settings(criterion=criterion)
    assert torch.equal(sparsified(weight, Curvature(inputs @ inputs.T), zeros, chosen), weight)


def error(weight: torch.Tensor, inputs: torch.Tensor, criterion: str, pattern: str) -> float:
    zeros = Zeros.of(pattern, 0.5, weight)
    chosen = settings(pattern, criterion=criterion, refit=False)
    sparse = sparsified(weight, Curvature(inputs @ inputs.T), zeros, chosen)
    return ((sparse - weight) @ inputs).square().sum().item()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_what_adapts_beats_what_weighs_inputs_beats_what_does_not(pattern: str, layer) -> None:
    errors = [error(*layer, criterion, pattern) for criterion in WEIGHT_CRITERIA]
    assert list(WEIGHT_CRITERIA) == ["splitting", "sparsegpt", "wanda", "magnitude"]
    assert errors == sorted(errors)
    assert errors[1] < 0.7 * errors[2]


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_refitting_finds_the_least_squares_solution_of_each_row(criterion: str, layer) -> None:
    weight, inputs = layer
    curvature = Curvature(inputs @ inputs.T)
    zeros = Zeros.of("unstructured", 0.5, weight)
    sparse = sparsified(weight, curvature, zeros, settings(criterion=criterion, refit=False))
    fitted = sparse
    for _ in range(20):
        fitted = refit(fitted, weight, curvature)
    for row in range(0, 40, 13):
        kept = sparse[row].nonzero().flatten()
        system = curvature.damped_II[kept][:, kept].double()
        best = torch.linalg.solve(
            system, (curvature.damped_II[kept].double() @ weight[row].double())
        )
        torch.testing.assert_close(fitted[row, kept].double(), best, rtol=2e-3, atol=2e-3)
    once = refit(sparse, weight, curvature)
    assert curvature.error(once - weight) <= curvature.error(sparse - weight)


def test_sparsegpt_is_optimal_brain_surgery_column_by_column(layer) -> None:
    weight, inputs = layer[0][:, :24], layer[1][:24]
    curvature = Curvature(inputs @ inputs.T)
    sparse = WEIGHT_CRITERIA["sparsegpt"](weight, curvature, Zeros.of("2:4", 0.5, weight))
    expected = weight.double().clone()
    system = curvature.damped_II.double()
    for column in range(24):
        # The exact update: what is right of it absorbs the loss, what is left stays.
        inverse = torch.linalg.inv(system[column:, column:])
        gone = sparse[:, column] == 0
        factor = expected[gone, column] / inverse[0, 0]
        expected[gone, column:] -= factor[:, None] * inverse[0]
    torch.testing.assert_close(sparse.double(), expected, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_always_zero_lose_their_weights_first(layer) -> None:
    weight, inputs = layer
    inputs[5] = 0
    for criterion in ("splitting", "sparsegpt", "wanda"):
        zeros = Zeros.of("unstructured", 0.5, weight)
        chosen = settings(criterion=criterion)
        sparse = sparsified(weight, Curvature(inputs @ inputs.T), zeros, chosen)
        assert (sparse[:, 5] == 0).all()
        assert sparse.isfinite().all()


def test_a_gram_matrix_that_is_not_definite_gets_more_damping(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gram = torch.eye(8)
    gram[0, 0] = -0.5
    with caplog.at_level(logging.WARNING):
        curvature = Curvature(gram)
    assert curvature.damping == pytest.approx(1.0)
    assert "not positive definite at damping 0.01; trying 0.1" in caplog.text
    with pytest.raises(ModelError, match="gives this layer nothing to learn from"):
        Curvature(torch.zeros(8, 8))


def sparsify(source: ModelInMemory, chosen: Sparsify, shares: Shares | None = None, **streams: Any):
    """State dict of the decoder blocks, the reports, and the walk that followed."""
    shares = shares or uniform_shares(source.config, chosen.share)
    gathered = None
    if chosen.needs_text:
        ids = random_ids(12, 32)
        gathered = SublayerStreams(source, ids, beside=chosen.correction > 0, batch_size=3)
    probe = Walk(source, random_ids(2, 16, seed=3))
    state: dict[str, torch.Tensor] = {}
    reports = sparsify_blocks(
        source, chosen, shares, streams=gathered, probe=probe, write=state.__setitem__
    )
    return state, reports, probe


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("variant", WITHOUT_EXPERTS)
def test_zeros_of_every_family_survive_saving_and_reloading(
    variant: str, pattern: str, tmp_path: Path
) -> None:
    model = tiny_model(variant).bfloat16()
    before = copy.deepcopy(model.state_dict())
    source = ModelInMemory(model)
    state, reports, probe = sparsify(source, settings(pattern))
    writer = ShardWriter(tmp_path, meta_model(model.config, torch.bfloat16))
    for name, value in {**model.state_dict(), **state}.items():
        writer.add(name, value)
    writer.close()
    model.config.save_pretrained(tmp_path)
    again = source.family.auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for index, report in enumerate(reports):
        assert [linear.name for linear in report] == linear_names(model.config, 0)
        for linear in report:
            block = again.get_submodule(f"{source.family.layers}.{index}")
            weight = weight_of(block, linear.name, source.family)
            if pattern == "2:4":
                groups = (weight == 0).reshape(len(weight), -1, 4).sum(-1)
                assert groups.unique().tolist() == [2]
            assert int((weight == 0).sum()) == linear.zeros
            assert linear.zeros == round(PATTERNS[pattern] * linear.weights)
            assert linear.error is not None and 0 < linear.error < 1
    with torch.no_grad():
        logits = again(random_ids(2, 16, seed=3)).logits
    for window in range(2):
        distance = (probe.logits(window) - logits[window]).norm()
        assert distance <= TOLERANCE[torch.bfloat16] * logits[window].norm()
    # The model that was found is as it was.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", MIXTURES)
def test_single_weights_of_experts_are_refused(variant: str) -> None:
    with pytest.raises(RecipeError, match=r"single weights of experts cannot be zeroed yet"):
        check_sparsify(tiny_model(variant).config, settings("unstructured"))


@pytest.mark.parametrize("variant", ["llama-tied-biased", "gemma3_text", "gpt_neox", "bert"])
def test_each_layer_is_fitted_to_what_the_layers_before_it_have_become(variant: str) -> None:
    source = ModelInMemory(tiny_model(variant))
    streams = SublayerStreams(source, random_ids(6, 16), beside=False, batch_size=2)
    follower = Walk(source, random_ids(6, 16), batch_size=2)
    for index in range(2):
        with source.block(index) as found:
            block = copy.deepcopy(found)
            for sublayer in source.family.sublayers:
                with captured_input(block, sublayer.linears[0]) as captured:
                    seen = []
                    for hidden in follower.batches():
                        follower.run(block, index, hidden)
                        seen += captured
                moments = streams.collect(sublayer, index, block, found)
                if sublayer.norm:
                    inputs = torch.cat(seen).flatten(0, 1)
                    torch.testing.assert_close(
                        moments.gram.total_II.float(), inputs.T @ inputs, rtol=1e-3, atol=1e-3
                    )
                for name in sublayer.linears:
                    block.get_submodule(name).weight.data.mul_(0.5)
                streams.advance(sublayer, index, block, found)
            follower.advance(block, index)
        torch.testing.assert_close(streams._changed.hidden_NLD, follower.hidden_NLD)


def test_correction_leads_nearer_to_the_model_as_it_was_found() -> None:
    source = ModelInMemory(tiny_model())
    dense = Walk(source, random_ids(2, 16, seed=3))
    for index in range(2):
        with source.block(index) as block:
            dense.advance(block, index)
    distance = {}
    for correction in (0.0, 0.5):
        _, _, probe = sparsify(source, settings(correction=correction))
        distance[correction] = (probe.hidden_NLD - dense.hidden_NLD).square().sum().item()
    assert distance[0.5] < distance[0.0]


def test_global_magnitude_takes_the_smallest_weights_of_the_whole_model() -> None:
    model = tiny_model()
    model.get_submodule("model.layers.1").self_attn.q_proj.weight.data[:9] = 0.01  # many ties
    source = ModelInMemory(model)
    chosen = settings(
        sparsity=0.3, criterion="magnitude", refit=False, correction=0, allocation="global"
    )
    state, reports, _ = sparsify(source, chosen, global_shares(source, 0.3))
    names = [
        f"model.layers.{i}.{name}.weight"
        for i in range(2)
        for name in linear_names(model.config, i)
    ]
    before = torch.cat([model.state_dict()[name].abs().flatten() for name in names])
    after = torch.cat([state[name].flatten() for name in names])
    assert int((after == 0).sum()) == round(0.3 * len(before))
    assert before[after == 0].max() <= before[after != 0].min()
    assert len({linear.zeros / linear.weights for block in reports for linear in block}) > 1


def test_owl_keeps_the_mean_and_spares_blocks_with_outliers() -> None:
    model = tiny_model(num_hidden_layers=4)
    model.get_submodule("model.layers.2").mlp.up_proj.weight.data[:, :3] *= 30
    source = ModelInMemory(model)
    chosen = settings(allocation="owl", max_deviation=0.1)
    norms = list(input_norms(source, random_ids(6, 16), batch_size=2))
    shares = [row["mlp.up_proj"] for row in owl_shares(source, chosen, norms)]
    assert sum(shares) / 4 == pytest.approx(PATTERNS["unstructured"], abs=1e-12)
    assert max(abs(share - PATTERNS["unstructured"]) for share in shares) == pytest.approx(0.1)
    assert min(shares) == shares[2]
    _, reports, _ = sparsify(source, chosen, owl_shares(source, chosen, norms))
    zeros = [sum(linear.zeros for linear in block) for block in reports]
    assert zeros.index(min(zeros)) == 2


def test_input_norms_are_those_of_the_inputs() -> None:
    source = ModelInMemory(tiny_model())
    seen: list[torch.Tensor] = []
    ids = random_ids(4, 16)
    hook = source.model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        source.model(ids)
    hook.remove()
    expected = seen[0].flatten(0, 1).norm(dim=0)
    norms = list(input_norms(source, ids, batch_size=2))[1]["mlp.down_proj"]
    torch.testing.assert_close(norms, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "sparsity is required"),
        ({"pattern": "4:2"}, "neither unstructured nor N:M with 0 < N < M"),
        ({"pattern": "0:4"}, "neither unstructured"),
        ({"pattern": "two:4"}, "neither unstructured"),
        ({"pattern": 124}, "quote it"),
        ({"pattern": "2:4", "sparsity": 0.6}, "makes a share of 0.5 zero, not 0.6"),
        ({"pattern": "2:4", "allocation": "owl"}, "fixes the share of every layer"),
        ({"sparsity": 0.5, "allocation": "global"}, "only criterion magnitude can"),
        ({"sparsity": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    raw = {"model": "m", "output": "o", "stages": [{"stage": "sparsify", **fields}]}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw)


def test_settings_that_do_not_fit_the_model() -> None:
    config = tiny_model().config
    with pytest.raises(RecipeError, match="rows that are a multiple of 5 weights long"):
        check_sparsify(config, Sparsify(pattern="2:5"))
    with pytest.raises(RecipeError, match="the valid ones are splitting, sparsegpt, wanda"):
        check_sparsify(config, Sparsify(sparsity=0.5, criterion="obs"))


def test_a_pattern_goes_through_a_recipe_file_and_back(tmp_path: Path) -> None:
    raw = {"model": "m", "output": "o", "stages": [{"stage": "sparsify", "pattern": "1:4"}]}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(parse_recipe(raw)))
    again = load_recipe(tmp_path / "recipe.yaml").stages[0]
    assert again == Sparsify(pattern="1:4")
    assert isinstance(again, Sparsify) and again.share == 0.75


def _zeros(folder: Path) -> int:
    """Of the linear layers of a checkpoint, as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    blocks, names = model.get_submodule("model.layers"), linear_names(model.config, 0)
    weights = [block.get_submodule(name).weight for block in blocks for name in names]
    return sum(int((weight == 0).sum()) for weight in weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.5, "allocation": "owl"},
        {"pattern": "2:4"},
        {"sparsity": 0.5, "criterion": "magnitude", "refit": False, "allocation": "global"},
    ],
)
def test_a_whole_run(recipe: dict[str, Any], changes: dict[str, Any]) -> None:
    recipe["stages"] = [{"stage": "sparsify", **changes}]
    folder = run(parse_recipe(recipe))
    metrics = load_metrics(folder / "metrics.json")
    assert metrics.zeroing is not None
    assert metrics.zeroing.zeros == metrics.zeroing.weights / 2
    assert metrics.after.weight_bytes == pytest.approx(metrics.before.weight_bytes, rel=0.02)
    assert _zeros(folder) == metrics.zeroing.zeros
    card = (folder / "README.md").read_text()
    assert "Single weights: 50" in card
    assert "no smaller and no faster in stock runtimes" in card


def test_zeros_after_structured_pruning_stay_through_a_refit(recipe: dict[str, Any]) -> None:
    recipe["stages"] += [{"stage": "sparsify", "sparsity": 0.5}, {"stage": "refit", "epochs": 1}]
    folder = run(parse_recipe(recipe))
    metrics = load_metrics(folder / "metrics.json")
    assert metrics.pruning is not None and metrics.zeroing is not None
    assert metrics.zeroing.weights < 0.75 * metrics.before.non_embedding_parameters
    assert _zeros(folder) == metrics.zeroing.zeros


def test_a_dry_run_says_that_zeros_save_nothing(recipe: dict[str, Any]) -> None:
    recipe["stages"] = [{"stage": "sparsify", "pattern": "1:4"}]
    said = "\n".join(describe(parse_recipe(recipe)))
    assert "75.0% of 41,472 weights" in said
    assert "zeros save no memory and no time in stock runtimes" in said
