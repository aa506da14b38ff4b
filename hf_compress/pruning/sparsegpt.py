"""SparseGPT: weights go column by column, and those to their right make up for them.

Frantar & Alistarh 2023: with U the upper Cholesky factor of H^-1, zeroing w_ij costs
w_ij^2 / U_jj^2, and row i absorbs it by -(w_ij / U_jj) U_j,j:. The mask is chosen a block of
columns at a time, or a group of M at a time, on the weights as they are by then.

Legend: O outputs (rows), I inputs (columns), B columns of a block.
"""

from __future__ import annotations

import torch

from hf_compress.pruning.masks import Zeros, lowest_in_groups, lowest_of_all
from hf_compress.regression.curvature import Curvature

BLOCK = 128
"""Columns whose mask is chosen at once, and whose effect on the rest is applied at once."""


def sparsegpt(weight_OI: torch.Tensor, curvature: Curvature, zeros: Zeros) -> torch.Tensor:
    """The weight [O, I] with zeros, the rest adapted to them; float32."""
    weight_OI = weight_OI.to(torch.float32, copy=True)
    factor_II = curvature.factor_II
    columns = weight_OI.shape[1]
    width = BLOCK if not zeros.group else max(1, BLOCK // zeros.group) * zeros.group
    done = 0
    for start in range(0, columns, width):
        mine, rest = slice(start, start + width), slice(start + width, columns)
        upto = zeros.count * min(start + width, columns) // columns
        weight_OB, error_OB = _sweep(weight_OI[:, mine], factor_II[mine, mine], zeros, upto - done)
        weight_OI[:, mine] = weight_OB
        weight_OI[:, rest].addmm_(error_OB, factor_II[mine, rest], alpha=-1)
        done = upto
    return weight_OI


def _sweep(
    weight_OB: torch.Tensor, factor_BB: torch.Tensor, zeros: Zeros, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of columns, and what the columns after it have to absorb."""
    weight_OB, error_OB = weight_OB.clone(), torch.zeros_like(weight_OB)
    scale_B = factor_BB.diagonal()
    mask_OB = lowest_of_all((weight_OB / scale_B).square(), 0 if zeros.group else count)
    for column in range(weight_OB.shape[1]):
        if zeros.group and column % zeros.group == 0:
            mine = slice(column, column + zeros.group)
            scores = (weight_OB[:, mine] / scale_B[mine]).square()
            mask_OB[:, mine] = lowest_in_groups(scores, zeros.group, zeros.removed)
        gone_O = mask_OB[:, column]
        error_O = weight_OB[:, column] * gone_O / scale_B[column]
        weight_OB[:, column:].addr_(error_O, factor_BB[column, column:], alpha=-1)
        weight_OB[gone_O, column] = 0
        error_OB[:, column] = error_O
    return weight_OB, error_OB
