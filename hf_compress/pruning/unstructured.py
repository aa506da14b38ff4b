"""Single weights of a whole model become zero, block after block, sub-layer after sub-layer.

Legend: O outputs (rows) of a linear layer, I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_compress.model.blocks import BlockSource
from hf_compress.model.families import Family, Sublayer
from hf_compress.model.memory import return_freed_memory
from hf_compress.model.rewrite import LayerStreams, rewrite_blocks
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk
from hf_compress.pruning.masks import Zeros
from hf_compress.pruning.weights import WEIGHT_CRITERIA, magnitude, refit
from hf_compress.recipe import Sparsify
from hf_compress.regression.curvature import Curvature
from hf_compress.regression.target import wanted
from hf_compress.statistics import Moments


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

    def change(
        block: nn.Module, index: int, sublayer: Sublayer, moments: Moments | None
    ) -> list[LinearReport]:
        return _sparsify(block, source.family, sublayer, moments, settings, shares[index])

    return rewrite_blocks(
        source,
        change,
        streams=streams,
        probe=probe,
        write=write,
        doing="sparsify",
        done="sparse",
    )


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
    aims, curvature = weights, None
    if moments:
        curvature = Curvature(moments.gram.total_II)
        # What reads the same inputs is one regression.
        wanted_OI = wanted(torch.cat(weights).float(), moments, settings.correction)
        aims = list(wanted_OI.split([len(weight_OI) for weight_OI in weights]))
    reports = []
    for name, weight_OI, wanted_OI in zip(sublayer.linears, weights, aims, strict=True):
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
