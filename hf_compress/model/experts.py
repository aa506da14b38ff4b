"""Cut a mixture of experts: which experts stay, and which neurons in each of them.

Legend: E experts, K kept ones, N neurons of one expert, S kept ones, F everything else that a
parameter holds of a neuron, D hidden size, P pairs of a token and an expert.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_compress.model.families import Experts, NeuronAxis

WIDTH_MULTIPLE = 8
"""Experts that are narrower have a multiple of so many neurons: transformers multiplies all experts
at once, with a kernel whose rows are multiples of 16 bytes."""


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


def output_weight(block: nn.Module, experts: Experts, expert: int) -> torch.Tensor:
    """Weight [D, N] of one expert's output layer, however the family stores it."""
    axis = experts.parameters[experts.output]
    assert axis is not None  # its columns are the neurons
    weight = block.get_parameter(experts.output)[expert]
    return weight if axis.dim == 2 else weight.T


def stack_outputs(weights: list[torch.Tensor], experts: Experts) -> torch.Tensor:
    """The output layers' weights [D, S] of several experts, as the family stores them."""
    axis = experts.parameters[experts.output]
    assert axis is not None
    return torch.stack(weights if axis.dim == 2 else [weight.T for weight in weights])


class NeuronProbe:
    """The experts of a block, made to give their neurons' activations, which is what the output
    layer of an expert reads.

    Their output layer becomes the identity on as many neurons as the residual stream has
    channels, chunk by chunk: so the activations are whatever the family's own module makes
    them, and multiplying by one and adding zeros rounds nothing.
    """

    def __init__(self, block: nn.Module, experts: Experts) -> None:
        self.device = block.get_parameter(experts.output).device
        channels, self.width = output_weight(block, experts, 0).shape
        self.count = len(block.get_parameter(experts.output))
        self._chunks = [
            _giving(block, experts, torch.arange(start, min(start + channels, self.width)))
            for start in range(0, self.width, channels)
        ]

    @torch.no_grad()
    def __call__(self, inputs_PD: torch.Tensor, expert_P: torch.Tensor) -> torch.Tensor:
        """Activations [P, N] of one expert for each token."""
        ones_P1 = torch.ones_like(expert_P[:, None], dtype=inputs_PD.dtype)
        given = [module(inputs_PD, expert_P[:, None], ones_P1) for module in self._chunks]
        return torch.cat(given, 1)[:, : self.width]


def _giving(block: nn.Module, experts: Experts, neurons_n: torch.Tensor) -> nn.Module:
    """The module of the experts, with these of their neurons as its first outputs."""
    module = copy.copy(block.get_submodule(experts.module))
    module._parameters = dict(module._parameters)
    for name, axis in experts.parameters.items():
        value = block.get_parameter(name).detach()
        if axis is None:  # a bias behind the output layer
            changed = torch.zeros_like(value)
        elif name == experts.output:
            channels = value.shape[3 - axis.dim]
            eye = torch.eye(channels, dtype=value.dtype, device=value.device)[: len(neurons_n)]
            one = eye if axis.dim == 1 else eye.T
            changed = one.expand(len(value), -1, -1).contiguous()
        else:
            neurons_En = neurons_n.to(value.device).expand(len(value), -1)
            changed = take_neurons(value, axis, neurons_En)
        short = name.removeprefix(f"{experts.module}.")
        module._parameters[short] = nn.Parameter(changed, requires_grad=False)
    return module
