"""Candidates: never less removed than asked, neurons alone among them, none of them idle."""

from __future__ import annotations

import pytest
import torch
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import meta_model
from hf_compress.model.families import native_config
from hf_compress.model.parameters import count_parameters
from hf_compress.plan import Plan
from hf_compress.pruning import candidate_plans
from hf_compress.pruning.allocation import MAX_CANDIDATES
from hf_compress.recipe import Prune
from tests.model.test_surgery import FOUR_HEADS_A_GROUP
from tests.tiny import CUTS_HEADS, MIXTURES, tiny_model

STRUCTURES = (
    ["mlp_neurons"],
    ["mlp_neurons", "query_heads"],
    ["layers"],
    ["mlp_neurons", "kv_groups", "query_heads", "layers"],
    ["kv_groups", "query_heads"],
)


def removed(config: PretrainedConfig, plan: Plan) -> float:
    """At least, whichever layers go: the first or the last ones."""
    widths, count = plan.widths, len(plan.layers)
    smaller = [
        native_config(
            config,
            widths.intermediate_size,
            widths.num_key_value_heads,
            widths.heads_per_group,
            kept,
            widths.num_experts,
        )
        for kept in (
            range(count),
            range(config.num_hidden_layers - count, config.num_hidden_layers),
        )
    ]
    before, *after = (
        count_parameters(meta_model(each, torch.float32)).non_embedding
        for each in (config, *smaller)
    )
    return 1 - max(after) / before


@pytest.mark.parametrize("structures", STRUCTURES, ids=" ".join)
@pytest.mark.parametrize("variant", CUTS_HEADS)
def test_every_candidate_removes_what_was_asked(variant: str, structures: list[str]) -> None:
    changes = {**FOUR_HEADS_A_GROUP, "num_hidden_layers": 8}
    config = tiny_model(variant, **changes).config
    sparsity = 0.2 if "mlp_neurons" in structures or "layers" in structures else 0.1
    if variant in MIXTURES:
        structures = ["experts" if name == "mlp_neurons" else name for name in structures]
        sparsity /= 1 if "experts" in structures or "layers" in structures else 4
    settings = Prune(sparsity=sparsity, structures=structures, round_to=8)
    plans = candidate_plans(config, settings)
    assert 1 <= len(plans) <= MAX_CANDIDATES
    assert len({plan.model_dump_json() for plan in plans}) == len(plans)
    assert all(removed(config, plan) >= sparsity for plan in plans)
    for plan in plans:
        widths = plan.widths
        assert (len(plan.layers) == 8) or "layers" in structures
        assert (widths.heads_per_group is None) or "query_heads" in structures
        assert (widths.num_key_value_heads == 3) or "kv_groups" in structures
        assert (widths.intermediate_size == 96) or "mlp_neurons" in structures
        assert (widths.num_experts is not None) == (variant in MIXTURES)
        assert (widths.num_experts in (None, 6)) or "experts" in structures
    if {"mlp_neurons", "experts"} & set(structures):
        widths = plans[0].widths
        assert (len(plans[0].layers), widths.num_key_value_heads, widths.heads_per_group) == (
            8,
            3,
            None,
        )


def test_each_structure_gets_its_turn() -> None:
    config = tiny_model("mistral", **FOUR_HEADS_A_GROUP, num_hidden_layers=16).config
    structures = ["mlp_neurons", "kv_groups", "query_heads", "layers"]
    plans = candidate_plans(config, Prune(sparsity=0.3, structures=structures, round_to=1))
    cut = [
        (
            16 - len(plan.layers),
            3 - plan.widths.num_key_value_heads,
            4 - (plan.widths.heads_per_group or 4),
        )
        for plan in plans
    ]
    assert len(plans) == MAX_CANDIDATES
    assert cut[0] == (0, 0, 0)
    assert {(1, 0, 0), (0, 1, 0), (0, 0, 1)} <= set(cut)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_layers_that_are_tied_to_their_index_cannot_be_dropped(
    variant: str, changes: dict[str, object]
) -> None:
    settings = Prune(sparsity=0.2, structures=["layers"])
    assert candidate_plans(tiny_model(variant, num_hidden_layers=4).config, settings)
    config = tiny_model(variant, num_hidden_layers=4, **changes).config
    (name,) = changes
    with pytest.raises(RecipeError, match=rf"{name}: .* of this {variant}.*leave layers out"):
        candidate_plans(config, settings)


def test_layers_alone_drop_as_few_as_reach_the_sparsity() -> None:
    config = tiny_model("llama", num_hidden_layers=8).config
    (plan,) = candidate_plans(config, Prune(sparsity=0.3, structures=["layers"]))
    assert len(plan.layers) == 5


@pytest.mark.parametrize(
    ("structures", "most"),
    [(["query_heads"], 0.2), (["layers"], 0.87), (["mlp_neurons", "query_heads"], 0.8)],
)
def test_out_of_reach_says_how_far_it_goes(structures: list[str], most: float) -> None:
    config = tiny_model("mistral", **FOUR_HEADS_A_GROUP, num_hidden_layers=8).config
    with pytest.raises(RecipeError, match=r"at most 0\.\d+") as error:
        candidate_plans(config, Prune(sparsity=0.95, structures=structures, round_to=8))
    share = float(str(error.value).split("at most ")[1].split()[0])
    assert share == pytest.approx(most, abs=0.1)
    reachable = Prune(sparsity=share - 0.01, structures=structures, round_to=8)
    assert candidate_plans(config, reachable)
    with pytest.raises(RecipeError):
        candidate_plans(config, Prune(sparsity=share + 0.01, structures=structures, round_to=8))
