"""Single weights of a whole model become zero, block after block, sub-layer after sub-layer.

Legend: O outputs (rows) of a linear layer, I inputs (columns).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.model.blocks import BlockSource
from hf_compress.model.families import Family, Sublayer
from hf_compress.model.layers import sublayers_of
from hf_compress.model.memory import return_freed_memory
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk, finite_state
from hf_compress.pruning.curvature import Curvature
from hf_compress.pruning.fold import Regression
from hf_compress.pruning.masks import Zeros
from hf_compress.pruning.weights import WEIGHT_CRITERIA, magnitude, refit
from hf_compress.recipe import Sparsify
from hf_compress.statistics import Moments

CORRECTION_DAMPING = 0.1
"""Share of the mean diagonal. Cross-validating it for every layer took a third longer and gave
no less KL (.448 against .440: SmolLM2-135M, half of the weights, 16 windows)."""


class LayerStreams(Protocol):
    """The calibration windows on their way through the model whose weights change."""

    def collect(
        self, sublayer: Sublayer, index: int, block: nn.Module, found: nn.Module
    ) -> Moments:
        """Moments of what a sub-layer of `block` reads; `found` is the block as it was."""
        ...

    def advance(self, sublayer: Sublayer, index: int, block: nn.Module, found: nn.Module) -> None:
        """Go on to the next sub-layer, through the changed one."""
        ...


@dataclass(frozen=True)
class LinearReport:
    """What zeroing weights of one linear layer did.

    Attributes:
        name: of the layer, relative to its block.
        zeros: weights that are zero.
        weights: all of them.
        error: share of the wanted output's energy that is lost; None without statistics.
    """

    name: str
    zeros: int
    weights: int
    error: float | None


def sparsify_blocks(
    source: BlockSource,
    settings: Sparsify,
    shares: Sequence[Mapping[str, float]],
    *,
    streams: LayerStreams | None,
    probe: Walk,
    write: Callable[[str, torch.Tensor], None],
) -> list[list[LinearReport]]:
    """Zero weights in every block and hand its tensors to `write`.

    Args:
        shares: of every block, the share of zeros of each linear layer by name.
        streams: gather the statistics; None where `settings` needs none.
        probe: a walk that follows the new model, for the check after saving.
        write: takes a tensor's name in the checkpoint, and the tensor.
    """
    reports = []
    for index in tqdm(range(source.config.num_hidden_layers), desc="sparsify", unit="block"):
        name = f"{source.family.layers}.{index}"
        with source.block(index) as found:
            block = copy.deepcopy(found)
            report = []
            for sublayer in sublayers_of(source.family, source.config, index):
                moments = streams.collect(sublayer, index, block, found) if streams else None
                report += _sparsify(
                    block, source.family, sublayer, moments, settings, shares[index]
                )
                if streams:
                    streams.advance(sublayer, index, block, found)
        for key, value in finite_state(block, name, "sparse"):
            write(key, value)
        probe.advance(block, index)
        reports.append(report)
    return reports


def _sparsify(
    block: nn.Module,
    family: Family,
    sublayer: Sublayer,
    moments: Moments | None,
    settings: Sparsify,
    shares: Mapping[str, float],
) -> list[LinearReport]:
    """Overwrite the weights of one sub-layer of `block`."""
    weights = [weight_of(block, name, family).detach() for name in sublayer.linears]
    wanted, curvature = weights, None
    if moments:
        curvature = Curvature(moments.gram.total_II)
        # What reads the same inputs is one regression.
        wanted_OI = _wanted(torch.cat(weights).float(), moments, settings.correction)
        wanted = list(wanted_OI.split([len(weight_OI) for weight_OI in weights]))
    reports = []
    for name, weight_OI, wanted_OI in zip(sublayer.linears, weights, wanted, strict=True):
        zeros = Zeros.of(settings.pattern, shares[name], weight_OI)
        error = None
        if zeros.count and curvature:
            sparse_OI = sparsified(wanted_OI, curvature, zeros, settings)
            error = curvature.error(wanted_OI - sparse_OI) / curvature.error(wanted_OI)
            weight_OI.copy_(sparse_OI)
        elif zeros.count:
            weight_OI.copy_(magnitude(weight_OI, None, zeros))
        left = int(weight_OI.count_nonzero())
        reports.append(LinearReport(name, weight_OI.numel() - left, weight_OI.numel(), error))
    return_freed_memory()
    return reports


def sparsified(
    weight_OI: torch.Tensor, curvature: Curvature, zeros: Zeros, settings: Sparsify
) -> torch.Tensor:
    """One weight with its zeros, the rest adapted to them if the settings say so."""
    if not zeros.count:
        return weight_OI
    sparse_OI = WEIGHT_CRITERIA[settings.criterion](weight_OI, curvature, zeros)
    return refit(sparse_OI, weight_OI, curvature) if settings.refit else sparse_OI


def _wanted(weight_OI: torch.Tensor, moments: Moments, correction: float) -> torch.Tensor:
    """The full weight that the sparse one is to imitate, float32 [O, I].

    Without a stream beside, that is the original. With one, it is the damped regression on
    what leads back to that stream, `correction` of the way; as ||T - W_hat X||^2 and
    ||(W* - W_hat) X||^2 differ by a constant where W* is the regression, the zeros and what
    adapts to them then need to know nothing of it.
    """
    cross = moments.cross
    if cross is None or not correction:
        return weight_OI
    gram_II = moments.gram.first_II + moments.gram.second_II
    target_OI = cross.first_DI + cross.second_DI
    if cross.of_inputs:
        target_OI = weight_OI @ target_OI
    own = Regression(weight_OI, gram_II, weight_OI @ gram_II, energy=0.0)
    everything = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    # Energies only shift an error that nobody asks for here.
    return own.toward(target_OI, 0.0, correction).on(everything).fold(CORRECTION_DAMPING)
