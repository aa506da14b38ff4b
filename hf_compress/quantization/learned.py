"""Learned rounding: codes and scales of a whole block by gradient descent on its output error.

The weights go on from inside the cells that error feedback (error_feedback.py) has put them in,
as near to where they were found as that allows; what is rounded passes its gradient on as if it
were not (straight through), and scales learn as in LSQ (Esser et al. 2020). Other than in
AutoRound (Cheng et al. 2024) a weight may go as far as it likes, biases and norms learn as well,
and the target makes up for what rounding did to earlier blocks (block_learning.py).

Legend: O outputs (rows) of a linear layer, I inputs (columns), B blocks of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_compress.block_learning import LearningReport, learn_block
from hf_compress.formats.grid import Codes, Grid
from hf_compress.model.walk import Walk
from hf_compress.recipe import Quantize

INSIDE = 0.9
"""Share of the way from a level to the border of its cell that a weight may start at."""


class Rounded(nn.Module):
    """Parametrization of a weight: what is read back once it is stored.

    Args:
        codes: where it starts.
        grid: of its format.
        transposed: whether the layer holds its weight as [I, O].
    """

    def __init__(self, codes: Codes, grid: Grid, transposed: bool) -> None:
        super().__init__()
        self.grid, self.transposed = grid, transposed
        self.scale_OB = nn.Parameter(codes.scale_OB.clone())

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        latent_OI = latent.T if self.transposed else latent
        scale_OI = self._scales(latent_OI.shape[1])
        units_OI = latent_OI / scale_OI
        levels_K = self.grid.levels_K
        with torch.no_grad():
            rounded_OI = self.grid.round(units_OI)
            moved_OI = rounded_OI - units_OI.clamp(levels_K[0], levels_K[-1])
        value_OI = (units_OI.clamp(levels_K[0], levels_K[-1]) + moved_OI) * scale_OI
        return value_OI.T if self.transposed else value_OI

    @torch.no_grad()
    def codes(self, latent: torch.Tensor) -> Codes:
        """What has been learned."""
        latent_OI = latent.T if self.transposed else latent
        units_OI = latent_OI / self._scales(latent_OI.shape[1])
        return Codes(self.grid.codes(units_OI).to(torch.uint8), self.scale_OB.detach().clone())

    def _scales(self, inputs: int) -> torch.Tensor:
        stored_OB = self.scale_OB + (self.grid.stored(self.scale_OB) - self.scale_OB).detach()
        return self.grid.spread(stored_OB, inputs)


@torch.no_grad()
def start_inside(weight_OI: torch.Tensor, codes: Codes, grid: Grid) -> torch.Tensor:
    """The weights nearest to those that were found whose codes are these; float32 [O, I]."""
    scale_OI = grid.spread(grid.stored(codes.scale_OB), weight_OI.shape[1])
    levels_K, codes_OI = grid.levels_K, codes.codes_OI.long()
    half_K = INSIDE * levels_K.diff() / 2
    below_K = torch.cat([torch.zeros(1, device=half_K.device), half_K])
    above_K = torch.cat([half_K, torch.zeros(1, device=half_K.device)])
    level_OI = levels_K[codes_OI]
    low_OI, high_OI = level_OI - below_K[codes_OI], level_OI + above_K[codes_OI]
    return (weight_OI.float() / scale_OI).clamp(low_OI, high_OI) * scale_OI


def learn_codes(
    block: nn.Module,
    dense: nn.Module,
    codes: Mapping[str, Codes],
    grids: Mapping[str, Grid],
    index: int,
    walk: Walk,
    beside: Walk,
    settings: Quantize,
) -> tuple[nn.Module, dict[str, Codes], LearningReport]:
    """The block with its parameters learned, and the codes of its linear layers.

    Args:
        block: with weights as they are read back; it is not changed.
        dense: the block as it was found.
        codes: of the linear layers of `block`, by name, on their `grids`.
        walk: stands before the block, `beside` behind `dense`.
    """
    transposed = walk.source.family.transposed
    learner = copy.deepcopy(block).float()
    for name, each in codes.items():
        found = dense.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
        found_OI = found.T if transposed else found
        latent_OI = start_inside(found_OI, each, grids[name])
        layer = learner.get_submodule(name)
        layer.weight.data = (latent_OI.T if transposed else latent_OI).contiguous()
        parametrize.register_parametrization(
            layer, "weight", Rounded(each, grids[name], transposed)
        )
    report = learn_block(learner, dense, index, walk, beside, settings)
    learned: dict[str, Codes] = {}
    for name in codes:
        layer = learner.get_submodule(name)
        rounded, latent = _parametrized(layer)
        learned[name] = rounded.codes(latent)
        parametrize.remove_parametrizations(layer, "weight")
    return learner.to(walk.hidden_NLD.dtype).eval(), learned, report


def _parametrized(layer: nn.Module) -> tuple[Rounded, torch.Tensor]:
    """What makes the weight of a layer, and of what."""
    parametrization: Any = layer.parametrizations["weight"]  # type: ignore[index, operator]
    return parametrization[0], parametrization.original
