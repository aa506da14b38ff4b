"""What a weight may become in a format: one of a few levels times its block's scale.

Legend: O outputs (rows) of a linear layer, I inputs (columns), B blocks of a row, K levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Grid:
    """The values `levels_K[code] * scale` that one linear layer can store.

    Attributes:
        levels_K: float32, ascending.
        block: columns that share a scale; 0 where a whole row does.
        reach: a block's largest magnitude over this is the scale that clips nothing.
        stored: what is read back of scales [O, B], all those of one weight, once they are
            stored; float32.
    """

    levels_K: torch.Tensor
    block: int = 0
    reach: float = 1.0
    stored: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda scale_OB: scale_OB)

    def to(self, device: torch.device) -> Grid:
        """The same on another device."""
        return replace(self, levels_K=self.levels_K.to(device))

    def columns(self, inputs: int) -> int:
        """Columns that share a scale in a layer with so many."""
        return self.block or inputs

    def spread(self, scale_OB: torch.Tensor, inputs: int) -> torch.Tensor:
        """The scale of every weight, [O, I]."""
        return scale_OB.repeat_interleave(self.columns(inputs), 1)

    def largest(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Scales [O, B] with which no weight is clipped; a block of zeros has 1."""
        blocks_OBC = weight_OI.unflatten(1, (-1, self.columns(weight_OI.shape[1])))
        scale_OB = blocks_OBC.abs().amax(2) / self.reach
        return torch.where(scale_OB > 0, scale_OB, 1.0)

    def codes(self, units: torch.Tensor) -> torch.Tensor:
        """Indices (int64) of the nearest levels, for weights in units of their scale."""
        return torch.bucketize(units, (self.levels_K[:-1] + self.levels_K[1:]) / 2)

    def round(self, units: torch.Tensor) -> torch.Tensor:
        """The nearest levels, for weights in units of their scale."""
        return self.levels_K[self.codes(units)]


@dataclass(frozen=True)
class Codes:
    """A weight on its grid.

    Attributes:
        codes_OI: uint8 indices of levels.
        scale_OB: float32, before they are stored.
    """

    codes_OI: torch.Tensor
    scale_OB: torch.Tensor

    def weight(self, grid: Grid) -> torch.Tensor:
        """What is read back: float32 [O, I]."""
        grid = grid.to(self.codes_OI.device)
        spread_OI = grid.spread(grid.stored(self.scale_OB), self.codes_OI.shape[1])
        return grid.levels_K[self.codes_OI.long()] * spread_OI
