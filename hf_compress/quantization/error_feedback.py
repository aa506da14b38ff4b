"""Codes that make up for each other: rounding column by column, and then one by one again.

GPTQ (Frantar et al. 2023): with U the upper Cholesky factor of H^-1, rounding column j errs by
e = (w_j - q_j) / U_jj, which the columns after it absorb by -e U_j,j:. The columns with the
largest H_jj come first; scales belong to blocks of columns as they stand in the weight, so the
order needs no index.

What is left is a quadratic in whole numbers, so scales and codes can go on in turn, each the
best that it can be given all others (coordinate descent).

Legend: O outputs (rows) of a linear layer, I inputs (columns), B blocks of a row, C columns of
one block or chunk.
"""

from __future__ import annotations

from functools import cached_property

import torch

from hf_compress.formats.grid import Codes, Grid
from hf_compress.regression.curvature import Curvature

SHRINKS = tuple(1 - 0.03 * step for step in range(9))
"""Shares of a block's largest magnitude that are tried as its reach (0.76 to 1)."""
CHUNK = 128
"""Columns whose effect on the others is applied at once."""
SWEEPS = 2
"""Times that scales and codes are improved in turn: more gained nothing that could be measured
(SmolLM2-135M, NF4, 16 windows)."""


class ErrorFeedback:
    """Quantizes layers that read the same inputs.

    Args:
        curvature: of those inputs.
    """

    def __init__(self, curvature: Curvature) -> None:
        self.curvature = curvature

    @cached_property
    def _order_I(self) -> torch.Tensor:
        return self.curvature.damped_II.diagonal().argsort(descending=True)

    @cached_property
    def _factor_II(self) -> torch.Tensor:
        """U of the columns in their order."""
        inverse_II = self.curvature.inverse_II[self._order_I][:, self._order_I]
        return torch.linalg.cholesky(inverse_II, upper=True).float()

    def quantize(self, weight_OI: torch.Tensor, grid: Grid) -> Codes:
        """Codes and scales of a weight.

        Args:
            weight_OI: what the rounded weight has to imitate; float32.
            grid: on the device of the weight.
        """
        damped_II, inputs = self.curvature.damped_II, weight_OI.shape[1]
        raw_OB = search_scales(weight_OI, damped_II.diagonal(), grid)
        scale_OI = grid.spread(grid.stored(raw_OB), inputs)
        levels_OI = self._round_in_order(weight_OI, grid, scale_OI)
        for _ in range(SWEEPS):
            raw_OB = improve_scales(weight_OI, levels_OI, raw_OB, damped_II, grid)
            scale_OI = grid.spread(grid.stored(raw_OB), inputs)
            levels_OI = improve_codes(weight_OI, levels_OI, scale_OI, damped_II, grid)
        return Codes(grid.codes(levels_OI).to(torch.uint8), raw_OB)

    def _round_in_order(
        self, weight_OI: torch.Tensor, grid: Grid, scale_OI: torch.Tensor
    ) -> torch.Tensor:
        """Levels [O, I] by GPTQ with scales that stay."""
        order_I, factor_II = self._order_I, self._factor_II
        # Transposed, so that a column is one piece of memory.
        left_IO = weight_OI.T[order_I].contiguous()
        scale_IO = scale_OI.T[order_I].contiguous()
        levels_IO = torch.empty_like(left_IO)
        for start in range(0, len(order_I), CHUNK):
            mine = slice(start, min(start + CHUNK, len(order_I)))
            near_CC, left_CO = factor_II[mine, mine], left_IO[mine]
            error_CO = torch.empty_like(left_CO)
            for column, scale_O in enumerate(scale_IO[mine]):
                level_O = grid.round(left_CO[column] / scale_O)
                error_CO[column] = (left_CO[column] - level_O * scale_O) / near_CC[column, column]
                left_CO[column:].addr_(near_CC[column, column:], error_CO[column], alpha=-1)
                levels_IO[start + column] = level_O
            left_IO[mine.stop :].addmm_(factor_II[mine, mine.stop :].T, error_CO, alpha=-1)
        levels_OI = torch.empty_like(weight_OI)
        levels_OI[:, order_I] = levels_IO.T
        return levels_OI


def search_scales(weight_OI: torch.Tensor, importance_I: torch.Tensor, grid: Grid) -> torch.Tensor:
    """For each block the scale [O, B], among shrunk ones, with which rounding errs least.

    Args:
        importance_I: weight of each column's squared error.
    """
    inputs = weight_OI.shape[1]
    shape = (len(weight_OI), -1, grid.columns(inputs))
    largest_OB = grid.largest(weight_OI)
    best_OB, least_OB = largest_OB, torch.full_like(largest_OB, torch.inf)
    for shrink in SHRINKS:
        scale_OB = largest_OB * shrink
        scale_OI = grid.spread(scale_OB, inputs)
        missing_OI = grid.round(weight_OI / scale_OI) * scale_OI - weight_OI
        error_OB = (missing_OI.square() * importance_I).view(shape).sum(2)
        best_OB = torch.where(error_OB < least_OB, scale_OB, best_OB)
        least_OB = torch.minimum(error_OB, least_OB)
    return best_OB


def improve_scales(
    weight_OI: torch.Tensor,
    levels_OI: torch.Tensor,
    raw_OB: torch.Tensor,
    damped_II: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Scales [O, B], one block after the other the least-squares optimum given all else."""
    inputs = weight_OI.shape[1]
    columns, best_OB = grid.columns(inputs), raw_OB.clone()
    pull_OI = (weight_OI - levels_OI * grid.spread(raw_OB, inputs)) @ damped_II
    for number in range(raw_OB.shape[1]):
        mine = slice(number * columns, (number + 1) * columns)
        levels_OC, old_O = levels_OI[:, mine], raw_OB[:, number]
        energy_O = ((levels_OC @ damped_II[mine, mine]) * levels_OC).sum(1)
        step_O = (pull_OI[:, mine] * levels_OC).sum(1) / energy_O.clamp_min(1e-30)
        # A block of zeros, or one that would turn its sign, keeps its scale.
        new_O = torch.where((energy_O > 0) & (old_O + step_O > 0), old_O + step_O, old_O)
        pull_OI.sub_((levels_OC * (new_O - old_O)[:, None]) @ damped_II[mine])
        best_OB[:, number] = new_O
    return best_OB


def improve_codes(
    weight_OI: torch.Tensor,
    levels_OI: torch.Tensor,
    scale_OI: torch.Tensor,
    damped_II: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Levels [O, I], one column after the other the nearest to the optimum given all others;
    the error never grows."""
    scale_IO, levels_IO = scale_OI.T.contiguous(), levels_OI.T.contiguous()
    pull_IO = damped_II @ (weight_OI.T - levels_IO * scale_IO)
    for start in range(0, len(levels_IO), CHUNK):
        mine = slice(start, min(start + CHUNK, len(levels_IO)))
        near_CC, pull_CO = damped_II[mine, mine], pull_IO[mine]
        change_CO = torch.empty_like(pull_CO)
        for column, scale_O in enumerate(scale_IO[mine]):
            old_O = levels_IO[start + column]
            level_O = grid.round(old_O + pull_CO[column] / (near_CC[column, column] * scale_O))
            change_CO[column] = (level_O - old_O) * scale_O
            pull_CO.addr_(near_CC[column], change_CO[column], alpha=-1)
            levels_IO[start + column] = level_O
        pull_IO[:start].addmm_(damped_II[:start, mine], change_CO, alpha=-1)
        pull_IO[mine.stop :].addmm_(damped_II[mine.stop :, mine], change_CO, alpha=-1)
    return levels_IO.T.contiguous()
