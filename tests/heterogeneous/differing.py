"""Tiny models whose layers differ in every way that a plan can say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_compress.heterogeneous.auto import STEMS
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.layers import dense_type
from hf_compress.model.surgery import Cut, Dimensions, cut_block
from hf_compress.plan import LayerPlan, Plan
from hf_compress.pruning import Templates
from tests.tiny import VARIANTS, tiny_model

ABLE = [variant for variant in VARIANTS if variant.split("-")[0] in STEMS]
"""Variants of families with a modelling file."""
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 12, "hidden_size": 96}
"""Four query heads in each of three KV groups."""
WHOLE = LayerPlan(intermediate_size=96, num_key_value_heads=3)
LAYERS = [
    LayerPlan(intermediate_size=32, num_key_value_heads=3),
    LayerPlan(intermediate_size=96, num_key_value_heads=2),
    LayerPlan(intermediate_size=96, num_key_value_heads=2, heads_per_group=3, skip=("mlp",)),
    LayerPlan(intermediate_size=64, num_key_value_heads=3, skip=("attention",)),
]


@dataclass
class Kept:
    """Units of one layer that stay; which ones they are differs from layer to layer."""

    neurons: torch.Tensor
    groups: torch.Tensor
    heads: torch.Tensor
    skip: frozenset[str]

    @classmethod
    def of(cls, layer: LayerPlan, index: int) -> Kept:
        def some(count: int, of: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(index)
            return torch.randperm(of, generator=generator)[:count].sort().values

        groups = some(layer.num_key_value_heads, 3)
        each = some(layer.heads_per_group or 4, 4)
        heads = (groups[:, None] * 4 + each).flatten()
        return cls(some(layer.intermediate_size, 96), groups, heads, frozenset(layer.skip))


def dense_model(variant: str) -> PreTrainedModel:
    return tiny_model(variant, **SIZES)


def differing_plan(variant: str, layers: list[LayerPlan] | None = None) -> Plan:
    return Plan(model_type=variant.split("-")[0], layers=layers or LAYERS)


def cut_to(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The model with the units of `Kept`, nothing folded."""
    source = ModelInMemory(model)
    templates, dims = Templates(source, plan), Dimensions.of(model.config)
    state = dict(source.skeleton().state_dict())
    for index, layer in enumerate(plan.layers):
        kept = Kept.of(layer, index)
        cut = Cut(kept.neurons, kept.groups, heads=kept.heads, skip=kept.skip)
        with source.block(index) as block:
            pruned = cut_block(block, templates.block(index), source.family, dims, cut)
        name = f"{source.family.layers}.{index}"
        state |= {f"{name}.{key}": value.clone() for key, value in pruned.state_dict().items()}
    smaller = AutoModelForCausalLM.from_config(templates.config, dtype=torch.float32).eval()
    found = smaller.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}
    smaller.tie_weights()
    return smaller


def differing_model(variant: str) -> PreTrainedModel:
    """Random weights; every layer is of other widths, two lack a sub-layer."""
    return cut_to(dense_model(variant), differing_plan(variant))


@torch.no_grad()
def masked(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The dense model, changed in place: what the plan takes away adds nothing any more."""
    source, dims = ModelInMemory(model), Dimensions.of(model.config)
    family = source.family
    for index, layer in enumerate(plan.layers):
        kept, block = Kept.of(layer, index), model.get_submodule(f"{family.layers}.{index}")
        columns = (kept.heads[:, None] * dims.head_dim + torch.arange(dims.head_dim)).flatten()
        for name, stays, part in (
            (family.attention_output, columns, "attention"),
            (family.mlp_output, kept.neurons, "mlp"),
        ):
            output = block.get_submodule(name)
            gone = torch.ones(output.in_features, dtype=torch.bool)
            gone[stays] = part in kept.skip
            output.weight[:, gone] = 0
            if part in kept.skip and output.bias is not None:
                output.bias.zero_()
    return model


def kind_of(model: PreTrainedModel) -> str:
    return dense_type(model.config)
