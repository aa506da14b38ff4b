"""FLAP (An et al., AAAI 2024) as its authors describe it, for comparison (criterion WIFV, AL-AM).

A unit is scored by the variance of its activations times the squared norm of its outgoing
weights; scores are standardized in every layer and compared over the whole model; what the lost
units gave on average becomes a bias of the output layer. Heads stay: with a handful of KV groups
a layer, their standardized scores say nothing beside those of hundreds of neurons (SmolLM2-135M
at 20 %: 2.85 times the dense perplexity where groups may go). Layers differ in width and get
biases, so the result is computed in memory and not saved.

Legend: T tokens, O outputs, I neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hf_compress.model.blocks import BlockSource, meta_model
from hf_compress.model.parameters import count_parameters
from hf_compress.model.surgery import Dimensions, unit_parameters, weight_of
from hf_compress.model.walk import Walk, captured_input


@dataclass
class Neurons:
    """The MLP neurons of one decoder block.

    Attributes:
        block: its index.
        parameters: of one neuron.
        mean_I: mean of each activation over the calibration text.
        scores_I: standardized.
    """

    block: int
    parameters: int
    mean_I: torch.Tensor
    scores_I: torch.Tensor


class FlapSource:
    """The dense model with what FLAP removes set to zero; a `BlockSource`.

    Attributes:
        removed_share: of the non-embedding parameters, biases not counted.
    """

    def __init__(self, source: BlockSource, ids_NL: torch.Tensor, sparsity: float) -> None:
        self._source = source
        self.config, self.family = source.config, source.family
        self.dtype, self.device = source.dtype, source.device
        units = _score(source, ids_NL)
        total = count_parameters(meta_model(source.config, source.dtype)).non_embedding
        self._gone, removed = _choose(units, sparsity * total)
        self.removed_share = removed / total

    def skeleton(self):  # type: ignore[no-untyped-def]
        return self._source.skeleton()

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        with self._source.block(index) as original:
            block = copy.deepcopy(original)
        for layer, gone_I in self._gone:
            if layer.block == index:
                _remove(block.get_submodule(self.family.mlp_output), gone_I, layer.mean_I)
        yield block


def _blocks(source: BlockSource) -> Iterator[nn.Module]:
    for index in range(source.config.num_hidden_layers):
        with source.block(index) as block:
            yield block


@torch.no_grad()
def _score(source: BlockSource, ids_NL: torch.Tensor) -> list[Neurons]:
    """Neurons of all blocks, from one pass over the calibration text."""
    family, dims = source.family, Dimensions.of(source.config)
    walk, units = Walk(source, ids_NL), []
    for index, block in enumerate(_blocks(source)):
        neuron, _ = unit_parameters(block, family, dims)
        seen = []
        for hidden_BLD in walk.batches():
            with captured_input(block, family.mlp_output) as captured:
                hidden_BLD.copy_(walk.run(block, index, hidden_BLD))
            seen.append(captured[0].flatten(0, -2).double().cpu())
        inputs_TI = torch.cat(seen)
        weight_OI = weight_of(block, family.mlp_output, family).double().cpu()
        scores_I = inputs_TI.var(0) * weight_OI.square().sum(0)
        scores_I = (scores_I - scores_I.mean()) / scores_I.std()
        units.append(Neurons(index, neuron, inputs_TI.mean(0), scores_I))
    return units


def _choose(units: list[Neurons], must_go: float) -> tuple[list[tuple[Neurons, torch.Tensor]], int]:
    """The lowest scores of the whole model, until enough parameters are gone; a layer keeps
    one unit. Returns what goes, as a mask [I] for each layer, and how much that is."""
    ranked = sorted(
        (score, layer, unit)
        for layer, of in enumerate(units)
        for unit, score in enumerate(of.scores_I.tolist())
    )
    gone = [torch.zeros(len(of.scores_I), dtype=torch.bool) for of in units]
    removed = 0
    for _, layer, unit in ranked:
        if removed >= must_go:
            break
        if gone[layer].sum() + 1 < len(gone[layer]):
            gone[layer][unit] = True
            removed += units[layer].parameters
    return list(zip(units, gone, strict=True)), removed


def _remove(linear: nn.Module, gone_I: torch.Tensor, mean_I: torch.Tensor) -> None:
    """Zero columns of an output layer, and give it the bias that stands for them."""
    weight_OI: torch.Tensor = linear.weight.data  # type: ignore[assignment,union-attr]
    gone_I = gone_I.to(weight_OI.device)
    bias_O = weight_OI.double()[:, gone_I] @ mean_I.to(weight_OI.device)[gone_I]
    old = linear.bias
    if isinstance(old, torch.Tensor):
        bias_O = bias_O + old.double()
    weight_OI[:, gone_I] = 0
    linear.bias = nn.Parameter(bias_O.to(weight_OI), requires_grad=False)
