"""Two halves are a block, and a replayed attention is the attention itself."""

from __future__ import annotations

import pytest
import torch

from hf_compress.calibration import collect, collect_beside
from hf_compress.model.blocks import ModelInMemory, attention_half, mlp_half, parts
from hf_compress.model.experts import ExpertCut
from hf_compress.model.families import FAMILIES, family_of, has_experts
from hf_compress.model.surgery import Cut, Dimensions, cut_block, expand, weight_of
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan
from hf_compress.pruning import Templates
from tests.tiny import VARIANTS, random_ids, tiny_model

HALVED = [variant for variant in VARIANTS if FAMILIES[variant.split("-")[0]].cuts_heads]
"""The others are walked one whole block after the other."""


@pytest.mark.parametrize("variant", HALVED)
def test_the_halves_one_after_the_other_are_the_block(variant: str) -> None:
    source = ModelInMemory(tiny_model(variant))
    whole, halves = (Walk(source, random_ids(6, 16), batch_size=2) for _ in range(2))
    for index in range(2):
        with source.block(index) as block:
            whole.advance(block, index)
            halves.advance(attention_half(block, source.family), index)
            halves.advance(mlp_half(block, source.family), index)
        assert torch.equal(whole.hidden_NLD, halves.hidden_NLD)


@pytest.mark.parametrize("variant", HALVED)
def test_a_replayed_attention_is_that_of_the_cut_block(variant: str) -> None:
    source = ModelInMemory(tiny_model(variant))
    family, dims = source.family, Dimensions.of(source.config)
    groups = torch.tensor([0, 2])
    templates = Templates(source, Plan.uniform(source.config.model_type, 2, 96, 2))
    computed, replayed = (Walk(source, random_ids(6, 16), batch_size=2) for _ in range(2))
    with source.block(0) as block:
        experts = ExpertCut(torch.arange(6)) if has_experts(source.config, 0) else None
        kept = Cut(None, groups, experts=experts)
        cut = cut_block(block, templates.block(0), family, dims, kept)
        inputs: list[torch.Tensor] = []
        half = attention_half(block, family)
        collect(replayed, half, 0, family.attention_output, "none", keep=inputs)
        replayed.advance_replayed(cut, 0, inputs, expand(groups, dims.group_width))
        computed.advance(attention_half(cut, family), 0)
    torch.testing.assert_close(replayed.hidden_NLD, computed.hidden_NLD)


def test_what_a_layer_would_have_to_add_is_measured_against_the_dense_stream() -> None:
    source = ModelInMemory(tiny_model())
    family = source.family
    pruned, dense = (Walk(source, random_ids(6, 16), batch_size=2) for _ in range(2))
    pruned.hidden_NLD.mul_(0.9)
    with source.block(0) as block:
        half = mlp_half(block, family)
        missing = dense.run(half, 0, dense.hidden_NLD[:2]) - pruned.hidden_NLD[:2]
        moments = collect_beside(pruned, dense, half, 0, family.mlp_output, "none")
        expected = Walk(source, random_ids(6, 16), batch_size=2)
        expected.advance(half, 0)
    assert torch.equal(dense.hidden_NLD, expected.hidden_NLD)
    assert moments.cross is not None
    rest = (expected.hidden_NLD[2:4] - pruned.hidden_NLD[2:4]).square().sum()
    energy = missing.square().sum() + rest
    assert moments.cross.first_energy == pytest.approx(energy.item(), rel=1e-4)


def adds_outputs(variant: str) -> bool:
    config = tiny_model(variant).config
    return family_of(config).adds_outputs(config)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if adds_outputs(variant)])
def test_without_drift_the_dense_stream_asks_for_the_layers_own_output(variant: str) -> None:
    """Biases, parallel residuals and what else there is between the two are accounted for."""
    source = ModelInMemory(tiny_model(variant))
    pruned, dense = (Walk(source, random_ids(6, 16), batch_size=2) for _ in range(2))
    with source.block(0) as block:
        for name, (part, output) in parts(block, source.family).items():
            if name == "mlp" and has_experts(source.config, 0):
                continue  # experts are not folded
            moments = collect_beside(pruned, dense, part, 0, output, "none")
            pruned.advance(part, 0)
            assert moments.cross is not None
            own_OI = weight_of(block, output, source.family) @ moments.gram.first_II
            torch.testing.assert_close(moments.cross.first_DI, own_OI, rtol=1e-3, atol=1e-2)
