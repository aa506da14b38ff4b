"""FLAP (An et al., AAAI 2024) as its authors describe it, for comparison (criterion WIFV, AL-AM).

A unit is scored by the variance of its activations times the squared norm of its outgoing
weights; scores are standardized in every layer, attention and MLP apart, and compared over the
whole model; what the lost units gave on average becomes a bias of the output layer. Heads go in
whole KV groups. Layers differ in width and get biases, so the result is computed in memory and
not saved.

Legend: T tokens, O outputs, I inputs of an output layer, U units.
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
class Units:
    """The units of one output layer.

    Attributes:
        block: index of its decoder block.
        name: of the layer.
        width: inputs that a unit feeds.
        parameters: of one unit.
        mean_I: mean of each input over the calibration text.
        scores_U: standardized.
    """

    block: int
    name: str
    width: int
    parameters: int
    mean_I: torch.Tensor
    scores_U: torch.Tensor


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
                _remove(block.get_submodule(layer.name), gone_I, layer.mean_I)
        yield block


def _blocks(source: BlockSource) -> Iterator[nn.Module]:
    for index in range(source.config.num_hidden_layers):
        with source.block(index) as block:
            yield block


@torch.no_grad()
def _score(source: BlockSource, ids_NL: torch.Tensor) -> list[Units]:
    """Units of all output layers, from one pass over the calibration text."""
    family, dims = source.family, Dimensions.of(source.config)
    walk, units = Walk(source, ids_NL), []
    for index, block in enumerate(_blocks(source)):
        neuron, group = unit_parameters(block, family, dims)
        sums: dict[str, list[torch.Tensor]] = {family.attention_output: [], family.mlp_output: []}
        for hidden_BLD in walk.batches():
            with (
                captured_input(block, family.attention_output) as heads,
                captured_input(block, family.mlp_output) as neurons,
            ):
                hidden_BLD.copy_(walk.run(block, index, hidden_BLD))
            for name, captured in zip(sums, (heads, neurons), strict=True):
                sums[name].append(captured[0].flatten(0, -2).double().cpu())
        for name, width, size in (
            (family.attention_output, dims.group_width, group),
            (family.mlp_output, 1, neuron),
        ):
            inputs_TI = torch.cat(sums[name])
            weight_OI = weight_of(block, name, family).double().cpu()
            scores_I = inputs_TI.var(0) * weight_OI.square().sum(0)
            scores_U = scores_I.view(-1, width).mean(1)
            scores_U = (scores_U - scores_U.mean()) / scores_U.std()
            units.append(Units(index, name, width, size, inputs_TI.mean(0), scores_U))
    return units


def _choose(units: list[Units], must_go: float) -> tuple[list[tuple[Units, torch.Tensor]], int]:
    """The lowest scores of the whole model, until enough parameters are gone; a layer keeps
    one unit. Returns what goes, as a mask [I] for each layer, and how much that is."""
    ranked = sorted(
        (score, layer, unit)
        for layer, of in enumerate(units)
        for unit, score in enumerate(of.scores_U.tolist())
    )
    gone = [torch.zeros(len(of.scores_U), dtype=torch.bool) for of in units]
    removed = 0
    for _, layer, unit in ranked:
        if removed >= must_go:
            break
        if gone[layer].sum() + 1 < len(gone[layer]):
            gone[layer][unit] = True
            removed += units[layer].parameters
    masks = [
        (of, gone_U.repeat_interleave(of.width)) for of, gone_U in zip(units, gone, strict=True)
    ]
    return masks, removed


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
