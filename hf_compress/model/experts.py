"""Cut a mixture of experts: which experts stay, and which neurons in each of them.

Legend: E experts, K kept ones, N neurons of one expert, S kept ones, F everything else that a
parameter holds of a neuron.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from hf_compress.model.families import Experts, NeuronAxis


@dataclass(frozen=True)
class ExpertCut:
    """What is kept of the experts of one block.

    Attributes:
        kept: sorted indices [K] of the kept experts.
        neurons: indices [K, S] of the neurons that each of them keeps, or None for all.
        parameters: new values of stacked parameters, K experts of all their neurons each, by
            name; those that are not named are sliced from the original.
        final: new values that are cut already, by name.
    """

    kept: torch.Tensor
    neurons: torch.Tensor | None = None
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    final: dict[str, torch.Tensor] = field(default_factory=dict)


def cut_experts(
    state: dict[str, torch.Tensor], experts: Experts, cut: ExpertCut
) -> dict[str, torch.Tensor]:
    """The parameters of router and experts after the cut, by name."""
    device = state[experts.router[0]].device
    kept = cut.kept.to(device)
    out = {}
    for name in (*experts.router, *experts.parameters):
        axis = experts.parameters.get(name)
        if name in cut.final:
            out[name] = cut.final[name].to(state[name])
            continue
        value = (
            cut.parameters[name].to(state[name]) if name in cut.parameters else state[name][kept]
        )
        if axis is not None and cut.neurons is not None:
            value = take_neurons(value, axis, cut.neurons.to(device))
        out[name] = value
    return out


def take_neurons(value: torch.Tensor, axis: NeuronAxis, neurons_KS: torch.Tensor) -> torch.Tensor:
    """A stacked parameter with each expert's neurons `neurons_KS`, in that order."""
    width = value.shape[axis.dim] // axis.parts
    parts_P = torch.arange(axis.parts, device=neurons_KS.device)
    if axis.interleaved:
        entries_KI = (neurons_KS[:, :, None] * axis.parts + parts_P).flatten(1)
    else:
        entries_KI = (neurons_KS[:, None, :] + width * parts_P[:, None]).flatten(1)
    shape = [len(value)] + [1] * (value.dim() - 1)
    shape[axis.dim] = -1
    index = entries_KI.view(shape)
    return value.take_along_dim(index, axis.dim)


def neuron_rows(value: torch.Tensor, axis: NeuronAxis) -> torch.Tensor:
    """What one expert's slice of a stacked parameter holds of each neuron, [N, F]."""
    rows = value.movedim(axis.dim - 1, 0)
    if axis.interleaved:
        return rows.reshape(len(rows) // axis.parts, -1)
    return rows.reshape(axis.parts, len(rows) // axis.parts, -1).movedim(0, 1).flatten(1)


def expert_parameters(block: nn.Module, experts: Experts) -> int:
    """Parameters of one expert, its part of the router included."""
    stacked = [block.get_parameter(name) for name in (*experts.router, *experts.parameters)]
    return sum(parameter.numel() // len(parameter) for parameter in stacked)


def expert_neuron_parameters(block: nn.Module, experts: Experts) -> int:
    """Parameters that go when every expert of a block loses one neuron."""
    total = 0
    for name, axis in experts.parameters.items():
        if axis is not None:
            parameter = block.get_parameter(name)
            total += parameter.numel() // parameter.shape[axis.dim] * axis.parts
    return total
