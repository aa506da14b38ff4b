"""Neurons inside experts: how they are seen, chosen and folded, and whole runs on mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import hf_compress.calibration.expert_neurons as expert_neurons
from hf_compress.calibration import collect_expert_neurons, collect_experts, neuron_bytes
from hf_compress.model.blocks import ModelInMemory, attention_half, mlp_half
from hf_compress.model.experts import NeuronProbe, output_weight, take_neurons
from hf_compress.model.families import Experts, family_of, has_experts
from hf_compress.model.walk import Walk, captured_input
from hf_compress.plan import Plan
from hf_compress.pruning import BlockReport, Streams, Templates, prune_blocks
from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.expert_neurons import selection_gram
from hf_compress.recipe import Prune
from hf_compress.statistics import NeuronMoments
from tests.tiny import MIXTURES, random_ids, tiny_model

WEIGHTING = "inverse_norm"


def settings(**changes: Any) -> Prune:
    return Prune(**{"sparsity": 0.3, "structures": ["expert_neurons"], "round_to": 8, **changes})


def plan_of(
    model: PreTrainedModel, width: int, *, experts: int | None = 6, groups: int = 3
) -> Plan:
    count = model.config.num_hidden_layers
    return Plan.uniform(model.config.model_type, count, width, groups, num_experts=experts)


def prune(
    model: PreTrainedModel, plan: Plan, chosen: Prune, ids_NL: torch.Tensor | None = None
) -> tuple[PreTrainedModel, list[BlockReport]]:
    """The model cut to a plan as the stage cuts it, without correction."""
    source = ModelInMemory(model)
    ids_NL = random_ids(16, 32) if ids_NL is None else ids_NL
    templates, walk = Templates(source, plan), Walk(source, ids_NL, 4)
    prefix = f"{source.family.layers}."
    state = {name: value for name, value in model.state_dict().items() if prefix not in name}
    streams = Streams(
        walk,
        None,
        lambda *_, **__: pytest.fail("no group is to go"),
        lambda half, index: collect_experts(walk, half, index, weighting=WEIGHTING),
        lambda half, index: collect_expert_neurons(walk, half, index, weighting=WEIGHTING),
    )
    reports = prune_blocks(
        source,
        None,
        plan,
        templates,
        chosen,
        streams=streams,
        probe=Walk(source, ids_NL[:1]),
        write=state.__setitem__,
    )
    pruned = templates.model
    pruned.load_state_dict(state, assign=True)
    return pruned.eval(), reports


def moments_of(
    model: PreTrainedModel, index: int = 1
) -> tuple[list[NeuronMoments], nn.Module, list[Any]]:
    """Moments of one layer's neurons, the half that they are in, and for each batch what its
    experts are called with, and the stream behind it."""
    source = ModelInMemory(model)
    walk, calls = Walk(source, random_ids(6, 24), batch_size=2), []
    for layer in range(index):
        walk.advance(model.get_submodule(f"{source.family.layers}.{layer}"), layer)
    block = model.get_submodule(f"{source.family.layers}.{index}")
    walk.advance(attention_half(block, source.family), index)
    half = mlp_half(block, source.family)
    with captured_input(half, source.family.experts.module) as captured:
        for hidden in walk.batches():
            stream = walk.run(half, index, hidden)
            calls.append((*captured, stream.flatten(0, -2)))
    return list(collect_expert_neurons(walk, half, index, weighting=WEIGHTING)), half, calls


def neurons_of(half: nn.Module, experts: Experts, inputs_TD: torch.Tensor, index: int):
    """What one expert's neurons make of tokens, by the formula of its family."""
    module = half.get_submodule(experts.module)
    gate_up = module.gate_up_proj[index]
    if hasattr(module, "gate_up_proj_bias"):
        both = inputs_TD @ gate_up + module.gate_up_proj_bias[index]
        gate = both[..., ::2].clamp(max=module.limit)
        up = both[..., 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(module.alpha * gate)
    gate, up = (inputs_TD @ gate_up.T).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("variant", MIXTURES)
@torch.no_grad()
def test_the_probe_gives_what_the_output_layers_read(variant: str) -> None:
    model = tiny_model(variant)
    _, half, [(inputs, *_), *_] = moments_of(model)
    experts = family_of(model.config).experts
    probe = NeuronProbe(half, experts)
    for index in range(6):
        found = probe(inputs, torch.full((len(inputs),), index))
        torch.testing.assert_close(found, neurons_of(half, experts, inputs, index))


@pytest.mark.parametrize("variant", MIXTURES)
@torch.no_grad()
def test_moments_are_those_of_what_an_expert_adds_to_the_stream(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(variant)
    experts = family_of(model.config).experts
    found, half, calls = moments_of(model)
    assert [each.expert for each in found] == list(range(6))
    for moments in found:
        grams = [torch.zeros(96, 96), torch.zeros(96, 96)]
        tokens = 0
        for number, (inputs, index, gates, stream) in enumerate(calls):
            at, place = (index == moments.expert).nonzero(as_tuple=True)
            scale = stream[at].square().mean(1).rsqrt() * gates[at, place]
            active = neurons_of(half, experts, inputs[at], moments.expert) * scale[:, None]
            grams[int(number >= 2)] += active.T @ active
            tokens += len(at)
        assert moments.tokens == tokens
        torch.testing.assert_close(moments.gram.first_II, grams[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.gram.second_II, grams[1], rtol=1e-4, atol=1e-5)
    # In passes over two experts each, to the same bits.
    monkeypatch.setattr(expert_neurons, "experts_at_a_time", lambda *_: 2)
    for one, other in zip(found, moments_of(model)[0], strict=True):
        assert torch.equal(one.gram.first_II, other.gram.first_II)
        assert (one.expert, one.tokens) == (other.expert, other.tokens)


def test_memory_for_gram_matrices_is_bounded() -> None:
    assert neuron_bytes(128, 768) < 2**30  # all of qwen3-30b-a3b
    assert expert_neurons.experts_at_a_time(8, 14336) == 6  # of mixtral-8x7b
    assert neuron_bytes(8, 14336) == 2 * 48 * 14336**2
    assert expert_neurons.experts_at_a_time(1, 10**6) == 1


def test_few_tokens_are_trusted_with_the_diagonal_only() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    assert torch.equal(selection_gram(gram, 0), gram.diagonal().diag())
    torch.testing.assert_close(selection_gram(gram, 10**9), gram)
    half = selection_gram(gram, 2)
    assert torch.equal(half.diagonal(), gram.diagonal())
    assert 0 < half[0, 1] < 1


@pytest.mark.parametrize("variant", MIXTURES)
@torch.no_grad()
def test_a_plan_that_keeps_all_changes_no_bit(variant: str) -> None:
    model = tiny_model(variant)
    pruned, reports = prune(model, plan_of(model, 96), settings())
    ids = random_ids(2, 16, seed=3)
    assert torch.equal(pruned(ids).logits, model(ids).logits)
    assert all(report == BlockReport(None, None) for report in reports)


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("variant", MIXTURES)
@torch.no_grad()
def test_cutting_neurons_is_masking_them(variant: str, criterion: str) -> None:
    """Without a fold: an expert that is left with S neurons is the dense one, in which the
    columns of the others are zero."""
    model = tiny_model(variant)
    pruned, reports = prune(model, plan_of(model, 64), settings(fold=False, criterion=criterion))
    experts, layers = family_of(model.config).experts, family_of(model.config).layers
    for index in range(model.config.num_hidden_layers):
        if not has_experts(model.config, index):
            assert reports[index].mlp is None
            continue
        whole, cut = (each.get_submodule(f"{layers}.{index}") for each in (model, pruned))
        kept = []
        for expert in range(6):
            dense, mine = (output_weight(block, experts, expert) for block in (whole, cut))
            assert mine.shape == (48, 64)
            alike = (dense[:, :, None] == mine[:, None, :]).all(0)
            assert torch.equal(alike.sum(0), torch.ones(64, dtype=torch.int64))
            gone = ~alike.any(1)
            dense[:, gone] = 0
            kept.append((~gone).nonzero().flatten().tolist())
        assert len({tuple(each) for each in kept}) > 1  # each expert chooses for itself
        assert reports[index].mlp.error == reports[index].mlp.error_without_fold > 0
    ids = random_ids(2, 16, seed=3)
    torch.testing.assert_close(pruned(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", MIXTURES)
def test_folding_never_has_the_larger_error(variant: str) -> None:
    model = tiny_model(variant)
    ids = random_ids(64, 32)
    reports = prune(model, plan_of(model, 64), settings(), ids)[1]
    mixed = [report for report in reports if report.expert_neurons]
    assert len(mixed) == sum(has_experts(model.config, index) for index in range(2))
    for report in mixed:
        assert report.mlp.error <= report.mlp.error_without_fold
        assert report.expert_neurons.few_tokens == 0
        assert report.mlp.damping is not None or report.expert_neurons.not_folded == 6


def plant_duplicates(model: PreTrainedModel) -> None:
    """In every expert, 32 of its 96 neurons become what others are but for their outgoing
    weights, each expert with its own order."""
    family = family_of(model.config)
    for index, block in enumerate(model.get_submodule(family.layers)):
        if not has_experts(model.config, index):
            continue
        order = torch.stack(
            [torch.randperm(96, generator=torch.Generator().manual_seed(e)) for e in range(6)]
        )
        again = torch.cat([order[:, :64], order[:, :32]], 1)
        # Neuron order[e, n] gets what again[e, n] has.
        source = torch.empty_like(order).scatter_(1, order, again)
        for name, axis in family.experts.parameters.items():
            if axis is not None and name != family.experts.output:
                value = block.get_parameter(name)
                value.copy_(take_neurons(value, axis, source))


@pytest.mark.parametrize("variant", MIXTURES)
@torch.no_grad()
def test_planted_duplicates_fold_without_changing_the_function(variant: str) -> None:
    model = tiny_model(variant)
    plant_duplicates(model)
    pruned, reports = prune(model, plan_of(model, 64), settings(), random_ids(384, 32))
    ids = random_ids(4, 24, seed=5)
    expected, found = model(ids).logits, pruned(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    for report in reports:
        if report.mlp is not None:
            assert report.mlp.error < 1e-6 < 1e-2 < report.mlp.error_without_fold
    dropped, _ = prune(model, plan_of(model, 64), settings(fold=False), random_ids(384, 32))
    assert (dropped(ids).logits - expected).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_experts_with_few_tokens_or_none_are_counted_and_not_folded() -> None:
    """The router never gives expert 4 a token, and the others few."""
    model = tiny_model("gpt_oss")
    experts = family_of(model.config).experts
    for block in model.model.layers:
        block.mlp.router.bias[4] = -1e4
    assert moments_of(model)[0][4].tokens == 0
    pruned, reports = prune(model, plan_of(model, 64), settings(), random_ids(2, 16))
    for index, report in enumerate(reports):
        assert report.expert_neurons.few_tokens == 6
        assert 1 <= report.expert_neurons.not_folded <= 6
        assert report.mlp.error <= report.mlp.error_without_fold
        # By the norm of what they give, since nothing else is known of them.
        dense, mine = (
            output_weight(each.model.layers[index], experts, 4) for each in (model, pruned)
        )
        kept = dense.square().sum(0).argsort()[-64:].sort().values
        assert torch.equal(mine, dense[:, kept])


def test_an_order_from_few_tokens_is_nearer_to_that_from_many() -> None:
    """Of which neurons go, other text judges: their loss after the fold is smaller by the shrunk
    Gram matrix than by the one that was seen."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) / 8
    spread = torch.logspace(0, 1, 64)
    weight = torch.randn(32, 64, generator=generator).double()

    def text(tokens: int) -> torch.Tensor:
        drawn = torch.randn(tokens, 64, generator=generator)
        return ((drawn + drawn @ mixing) * spread).double()

    other = text(20000)
    losses = {}
    for name, tokens_trusted in (("seen", 10**12), ("shrunk", 16)):
        losses[name] = 0.0
        for _ in range(8):
            seen = text(16)
            gram = selection_gram(seen.T @ seen, tokens_trusted)
            gone = CRITERIA["obs"](weight, gram, 1, 44, 1)[:20]
            lost = other[:, gone] @ weight[:, gone].T
            losses[name] += lost.square().sum().item()
    assert losses["shrunk"] < 0.9 * losses["seen"]
