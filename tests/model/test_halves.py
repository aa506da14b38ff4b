"""Two halves are a block, and a replayed attention is the attention itself."""

from __future__ import annotations

import pytest
import torch

from hf_compress.calibration import collect, collect_beside
from hf_compress.model.blocks import ModelInMemory, attention_half, mlp_half
from hf_compress.model.experts import ExpertCut
from hf_compress.model.families import has_experts
from hf_compress.model.surgery import Cut, Dimensions, cut_block, expand
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan
from hf_compress.pruning import Templates
from tests.tiny import VARIANTS, random_ids, tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_halves_one_after_the_other_are_the_block(variant: str) -> None:
    source = ModelInMemory(tiny_model(variant))
    whole, halves = (Walk(source, random_ids(6, 16), batch_size=2) for _ in range(2))
    for index in range(2):
        with source.block(index) as block:
            whole.advance(block, index)
            halves.advance(attention_half(block, source.family), index)
            halves.advance(mlp_half(block, source.family), index)
        assert torch.equal(whole.hidden_NLD, halves.hidden_NLD)


@pytest.mark.parametrize("variant", VARIANTS)
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
