"""Costs are those of the models that come out, and the solver's optimum is one."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import meta_model
from hf_compress.model.parameters import count_parameters, kv_bytes_per_token
from hf_compress.pruning import planned_config
from hf_compress.search.costs import count_costs
from hf_compress.search.solver import solve
from hf_compress.search.space import MAX_LEVELS, MAX_UNIFORM_LEVELS, Genome, Space
from hf_compress.search.uniform import genome_of, uniform_plans
from tests.heterogeneous.differing import ABLE
from tests.search.conftest import STRUCTURES, Ready
from tests.tiny import tiny_model


def some_genome(space: Space, seed: int) -> Genome:
    rng = random.Random(seed)
    return tuple(rng.randrange(len(choice.levels)) for choice in space.choices)


@pytest.mark.parametrize("variant", ABLE)
@pytest.mark.parametrize("seed", range(3))
def test_counted_costs_are_those_of_the_planned_model(variant: str, seed: int) -> None:
    config = tiny_model(variant, num_hidden_layers=3).config
    space = Space.of(config, STRUCTURES, 16)
    costs = count_costs(config, space, torch.bfloat16, 32)
    genome = some_genome(space, seed)
    planned = planned_config(config, space.plan(genome, config))
    model = meta_model(planned, torch.bfloat16)
    counted = count_parameters(model)
    assert costs.total("parameters", genome) == counted.total
    assert costs.total("non_embedding_parameters", genome) == counted.non_embedding
    assert costs.total("weight_bytes", genome) == 2 * counted.total
    assert costs.total("kv_bytes_per_token", genome) == kv_bytes_per_token(planned, 2)


def test_flops_are_those_of_the_matrices_and_of_attention(ready: Ready) -> None:
    config, costs = ready.model.config, ready.costs
    matrices = sum(p.numel() for p in ready.model.model.layers.parameters())
    head = config.vocab_size * config.hidden_size
    attention = 3 * 2 * 2 * 32 * config.num_attention_heads * config.head_dim
    assert costs.dense["flops_per_token"] == 2 * (matrices + head) + attention


@pytest.mark.parametrize("share", [0.55, 0.7, 0.85])
def test_the_solver_finds_what_trying_all_finds(ready: Ready, share: float) -> None:
    space = Space.of(ready.model.config, ("mlp_neurons", "kv_groups"), 32)
    costs = count_costs(ready.model.config, space, torch.float32, 32)
    rng = np.random.default_rng(int(share * 100))
    scores = [np.sort(rng.random(len(choice.levels)))[::-1] for choice in space.choices]
    limits = {
        "parameters": share * costs.dense["parameters"],
        "kv_bytes_per_token": 0.8 * costs.dense["kv_bytes_per_token"],
    }

    def score(genome: Genome) -> float:
        return sum(float(of[level]) for of, level in zip(scores, genome, strict=True))

    every = product(*(range(len(choice.levels)) for choice in space.choices))
    best = min(score(genome) for genome in every if costs.within(genome, limits))
    found = solve(costs, scores, limits)
    assert costs.within(found, limits)
    assert score(found) <= best * 1.002


def test_a_budget_out_of_reach_says_which_and_how_far_it_can_go(ready: Ready) -> None:
    space = Space.of(ready.model.config, ("mlp_neurons",), 16)
    costs = count_costs(ready.model.config, space, torch.float32, 32)
    limits = {"kv_bytes_per_token": 0.5 * costs.dense["kv_bytes_per_token"]}
    with pytest.raises(RecipeError, match=r"kv_bytes_per_token of .* at least .* \(1\.000\)"):
        costs.check(limits)
    with pytest.raises(RecipeError, match="kv_bytes_per_token"):
        uniform_plans(ready.model.config, costs, limits, layers=False)


def test_uniform_plans_are_as_wide_as_the_budgets_allow(ready: Ready) -> None:
    space = Space.of(ready.model.config, ("mlp_neurons", "kv_groups"), 8)
    costs = count_costs(ready.model.config, space, torch.float32, 32)
    limits = {"non_embedding_parameters": 0.7 * costs.dense["non_embedding_parameters"]}
    plans = uniform_plans(ready.model.config, costs, limits, layers=False)
    assert len(plans) > 1
    for plan in plans:
        genome = genome_of(costs, plan)
        assert costs.within(genome, limits)
        wider = space.nearest(plan.widths.num_key_value_heads, plan.widths.intermediate_size + 8)
        assert not costs.within(wider, limits)


def test_uniform_plans_may_drop_layers(ready: Ready) -> None:
    space = Space.of(ready.model.config, ("mlp_neurons", "kv_groups"), 8)
    costs = count_costs(ready.model.config, space, torch.float32, 32)
    limits = {"parameters": 0.6 * costs.dense["parameters"]}
    plans = uniform_plans(ready.model.config, costs, limits, layers=True)
    assert {len(plan.layers) for plan in plans} > {3}
    for plan in plans:
        settled = plan.model_copy(update={"kept_layers": list(range(len(plan.layers)))})
        model = meta_model(planned_config(ready.model.config, settled), torch.float32)
        assert count_parameters(model).total <= limits["parameters"]


def test_widths_that_all_layers_share_are_told_apart_more_finely() -> None:
    config = tiny_model("llama", intermediate_size=512).config
    few = Space.of(config, ("mlp_neurons",), 8).choices[1].levels
    many = Space.of(config, ("mlp_neurons",), 8, most=MAX_UNIFORM_LEVELS).choices[1].levels
    assert len(few) <= MAX_LEVELS
    assert many == tuple(range(8, 513, 8))
    assert set(few) < set(many)
