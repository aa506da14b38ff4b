"""Cut a decoder block to the units that a plan keeps.

Legend: O outputs (rows) of a linear layer, I inputs (columns).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from hf_compress.model.experts import ExpertCut, cut_experts
from hf_compress.model.families import Family, family_of, head_dim_of, mlp_width
from hf_compress.model.layers import layer_config, skipped


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a dense decoder block."""

    intermediate_size: int
    """In a model with experts, of one of them."""
    num_key_value_heads: int
    heads_per_group: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig, index: int | None = None) -> Dimensions:
        """Of layer `index`; which one, need only be said where they differ."""
        if index is not None:
            config = layer_config(config, index)
        groups = getattr(config, family_of(config).key_value_heads)
        return cls(
            mlp_width(config), groups, config.num_attention_heads // groups, head_dim_of(config)
        )

    @property
    def group_width(self) -> int:
        """Columns of the attention output layer that one KV group feeds."""
        return self.heads_per_group * self.head_dim


def widest_output(config: PretrainedConfig) -> int:
    """Inputs of the widest output layer that is folded, those of experts left aside."""
    widest = 0
    for index in range(config.num_hidden_layers):
        dims, gone = Dimensions.of(config, index), skipped(config, index)
        if "attention" not in gone:
            widest = max(widest, dims.num_key_value_heads * dims.group_width)
        if "mlp" not in gone and not family_of(config).experts:
            widest = max(widest, dims.intermediate_size)
    return widest


@dataclass(frozen=True)
class Cut:
    """What is kept of one block, and the output layers' new weights.

    Attributes:
        neurons: sorted indices of the kept MLP neurons, or None where the MLP stays whole or
            is one of experts.
        groups: sorted indices of the kept KV groups.
        heads: sorted indices of the kept query heads, as many in every kept group, or None
            for all heads of these groups.
        mlp_output_OI: weight of the MLP output layer on the kept neurons, or None to
            slice the original.
        attention_output_OI: likewise for the attention output layer.
        experts: what is kept of the experts; None in a block that has none.
        skip: of `attention` and `mlp`, what goes as a whole, with its norms.
    """

    neurons: torch.Tensor | None
    groups: torch.Tensor
    mlp_output_OI: torch.Tensor | None = None
    attention_output_OI: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    experts: ExpertCut | None = None
    skip: frozenset[str] = frozenset()

    def query_heads(self, dims: Dimensions) -> torch.Tensor:
        """Kept query heads."""
        return expand(self.groups, dims.heads_per_group) if self.heads is None else self.heads

    def query_columns(self, dims: Dimensions) -> torch.Tensor:
        """Kept columns of the attention output layer."""
        return expand(self.query_heads(dims), dims.head_dim)


def weight_of(block: nn.Module, name: str, family: Family) -> torch.Tensor:
    """Weight [O, I] of a linear layer of a block, however the family stores it."""
    weight: torch.Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
    return weight.T if family.transposed else weight


def expand(units: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the rows or columns that belong to `units` of `width` each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def cut_state(
    state: dict[str, torch.Tensor], family: Family, dims: Dimensions, cut: Cut
) -> dict[str, torch.Tensor]:
    """State dict of a block after the cut; tensors that no unit owns are passed on."""
    state = _turned(state, family)
    device = next(iter(state.values())).device
    groups, dense_groups = cut.groups.to(device), dims.num_key_value_heads
    kept = {
        "query": (cut.query_columns(dims).to(device), dense_groups * dims.group_width),
        "kv": (expand(groups, dims.head_dim), dense_groups * dims.head_dim),
    }
    inputs = dict(family.attention_inputs)
    outputs = []
    if family.cuts_heads:
        outputs.append((family.attention_output, kept["query"][0], cut.attention_output_OI))
    if cut.neurons is not None:
        neurons = cut.neurons.to(device)
        kept["neurons"] = (neurons, dims.intermediate_size)
        inputs |= family.mlp_inputs
        outputs.append((family.mlp_output, neurons, cut.mlp_output_OI))
    cut_rows = {
        f"{name}.{kind}": _rows([kept[segment] for segment in segments])
        for name, segments in inputs.items()
        for kind in ("weight", "bias")
    }
    cut_rows |= dict.fromkeys(family.head_parameters, cut.query_heads(dims).to(device))
    out = {
        name: value[cut_rows[name]] if name in cut_rows else value for name, value in state.items()
    }
    if cut.experts is not None and family.experts is not None:
        out |= cut_experts(state, family.experts, cut.experts)
    for name, columns, replacement in outputs:
        dense = state[f"{name}.weight"]
        sliced = dense[:, columns] if replacement is None else replacement.to(dense)
        out[f"{name}.weight"] = sliced
    return {name: value.contiguous() for name, value in _turned(out, family).items()}


def cut_block(
    block: nn.Module, template: nn.Module, family: Family, dims: Dimensions, cut: Cut
) -> nn.Module:
    """A new block: `template` (meta device, right widths) filled with what is kept."""
    twin = copy.deepcopy(template)
    state = cut_state(dict(block.state_dict()), family, dims, cut)
    if cut.skip:
        # What a template without the sub-layer does not name: its tensors and its norms'.
        state = {name: state[name] for name in twin.state_dict()}
    twin.load_state_dict(state, assign=True)
    return twin.eval()


def unit_parameters(block: nn.Module, family: Family, dims: Dimensions) -> tuple[int, int]:
    """Parameters of one MLP neuron and of one KV group, biases of their rows included; 0 for a
    neuron in a family with experts, which own them, and for a group where heads cannot be cut."""
    owned = {
        "neurons": 1,
        "query": dims.group_width,
        "kv": dims.head_dim,
    }

    def rows(parts: dict[str, tuple[str, ...]]) -> int:
        total: int = 0
        for name, segments in parts.items():
            per_row = weight_of(block, name, family).shape[1]
            per_row += block.get_submodule(name).bias is not None
            total += sum(owned[segment] for segment in segments) * per_row
        return total

    neuron = 0
    if not family.experts:
        neuron = rows(family.mlp_inputs) + weight_of(block, family.mlp_output, family).shape[0]
    if not family.cuts_heads:
        return neuron, 0
    attention_rows = weight_of(block, family.attention_output, family).shape[0]
    group = rows(family.attention_inputs) + attention_rows * dims.group_width
    return neuron, group + len(family.head_parameters) * dims.heads_per_group


def _turned(state: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """From weights as the family stores them to [O, I], or back."""
    if not family.transposed:
        return state
    layers = (*family.attention_inputs, family.attention_output)
    layers += (*family.mlp_inputs, family.mlp_output)
    names = {f"{layer}.weight" for layer in layers}
    return {name: value.T if name in names else value for name, value in state.items()}


def _rows(segments: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Kept rows of a projection made of one or more segments, each offset by those before."""
    offset, rows = 0, []
    for kept, size in segments:
        rows.append(kept + offset)
        offset += size
    return torch.cat(rows)
