"""Gates learn: their gradients are what a unit adds after refolding, and KL falls by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import gates
from benchmarks.gates import GatedLayer, Gates
from hf_compress.model.families import family_of
from hf_compress.model.surgery import Dimensions, expand, weight_of
from hf_compress.plan import Plan
from hf_compress.pruning.layer import PROBE_DAMPING
from hf_compress.recipe import Prune
from hf_compress.regression.fold import Regression
from tests.tiny import random_ids, tiny_model

SETTINGS = Prune(sparsity=0.3, round_to=8)


def problem(inputs: int = 24) -> Regression:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    inputs_IT = mixing @ torch.randn(inputs, 300, generator=generator, dtype=torch.float64)
    weight_OI = torch.randn(7, inputs, generator=generator, dtype=torch.float64)
    return Regression.of_own_output(weight_OI, inputs_IT @ inputs_IT.T)


def folded_on(units: list[int], width: int) -> torch.Tensor:
    """The folded weight [O, I] of the problem where these units stay, by the package's fold."""
    columns = expand(torch.tensor(sorted(units)), width)
    out_OI = torch.zeros_like(problem().weight_OI)
    out_OI[:, columns] = problem().on(columns).fold(PROBE_DAMPING)
    return out_OI


@pytest.mark.parametrize("width", [1, 4])
def test_a_gate_is_worth_what_its_unit_adds_once_the_rest_has_adapted(width: int) -> None:
    units = 24 // width
    order_U = torch.randperm(units, generator=torch.Generator().manual_seed(1))
    layer = GatedLayer(problem(), order_U, width, units // 2, fold=True)
    kept = layer.kept.tolist()
    now_OI = folded_on(kept, width)
    torch.testing.assert_close(layer.effective_OI.double(), now_OI, rtol=1e-3, atol=1e-3)
    gradient_OI = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))
    found_U = layer.gradient(gradient_OI)
    for unit in range(units):
        others = [other for other in kept if other != unit]
        change_OI = folded_on([*others, unit], width) - folded_on(others, width)
        expected = (gradient_OI.double() * change_OI).sum().item()
        assert found_U[unit].item() == pytest.approx(expected, rel=1e-3, abs=1e-2)


def test_without_fold_a_gate_is_worth_its_own_columns() -> None:
    layer = GatedLayer(problem(), torch.arange(6), 4, 3, fold=False)
    weight_OI = problem().weight_OI.float()
    torch.testing.assert_close(layer.effective_OI[:, 12:], weight_OI[:, 12:])
    assert (layer.effective_OI[:, :12] == 0).all()
    gradient_OI = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))
    expected_U = (gradient_OI * weight_OI).sum(0).view(6, 4).sum(1)
    torch.testing.assert_close(layer.gradient(gradient_OI), expected_U)


def test_the_first_choice_is_the_one_given() -> None:
    order_U = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    layer = GatedLayer(problem(), order_U, 1, 10, fold=True)
    assert layer.choose() == 0
    assert set(layer.order_U[14:].tolist()) == set(order_U[14:].tolist())


def chosen(model: PreTrainedModel, orders: list[torch.Tensor]) -> dict[str, GatedLayer]:
    """Gates of the MLPs, half of which stay, first by these orders; inputs uncorrelated."""
    family, layers = family_of(model.config), {}
    for index, order_U in enumerate(orders):
        name = f"{family.layers}.{index}"
        weight_OI = weight_of(model.get_submodule(name), family.mlp_output, family)
        gram_II = torch.eye(len(order_U), dtype=torch.float64)
        own = Regression.of_own_output(weight_OI.detach().double(), gram_II)
        layers[f"{name}.{family.mlp_output}"] = GatedLayer(own, order_U, 1, len(order_U) // 2, True)
    return layers


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma2", "gpt2", "bert"])
def test_training_beats_its_start_and_chance(variant: str) -> None:
    model, ids_NL = tiny_model(variant), random_ids(8, 32)
    family, worst = family_of(model.config), []
    for index in range(model.config.num_hidden_layers):
        block = model.get_submodule(f"{family.layers}.{index}")
        weight_OI = weight_of(block, family.mlp_output, family).detach()
        weight_OI[:, ::2] *= 0.01  # half of the neurons do nothing, and they are kept first
        worst.append(weight_OI.square().sum(0).argsort(descending=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    by_chance = [torch.randperm(len(order_U), generator=generator) for order_U in worst]

    def divergence(layers: dict[str, GatedLayer]) -> float:
        return gates._Student(model, layers).step(ids_NL)

    layers = chosen(model, worst)
    start = divergence(layers)
    gates.learn(model, layers, ids_NL, Gates(80, 4, 0.05))
    assert divergence(layers) < 0.5 * start
    assert divergence(layers) < divergence(chosen(model, by_chance))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gates_that_do_not_move_give_what_the_criterion_gives() -> None:
    ids_NL, plan = random_ids(16, 32), Plan.uniform("llama", 2, 64, 2)
    still = gates.prune_by_gates(tiny_model(), ids_NL, plan, SETTINGS, Gates(2, 1, 1e-6))
    plain = gates._cut(tiny_model(), ids_NL, plan, SETTINGS, lambda _, __, layer: layer)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(still.model.state_dict()[name], value)


def test_a_plan_is_kept_and_a_run_can_be_repeated() -> None:
    ids_NL, plan = random_ids(16, 32), Plan.uniform("llama", 2, 64, 2)
    first, second = (
        gates.prune_by_gates(tiny_model(), ids_NL, plan, SETTINGS, Gates(8, 2, 0.1))
        for _ in range(2)
    )
    dims = Dimensions.of(first.config)
    assert (dims.intermediate_size, dims.num_key_value_heads) == (64, 2)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    plain = gates._cut(tiny_model(), ids_NL, plan, SETTINGS, lambda _, __, layer: layer)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(plain.model.state_dict()[name], first.model.state_dict()[name])


def test_windows_come_once_before_any_comes_again() -> None:
    taken = gates._windows(6, replace(Gates(), steps=4, windows_per_step=2), seed=0).flatten()
    assert sorted(taken[:6].tolist()) == list(range(6))
    assert len(taken) == 8
