"""Criteria for single weights: one function and one line in `WEIGHT_CRITERIA` each.

Legend: O outputs (rows) of a linear layer, I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_compress.pruning.masks import Zeros, lowest, lowest_in_rows
from hf_compress.pruning.sparsegpt import sparsegpt
from hf_compress.pruning.splitting import splitting
from hf_compress.regression.curvature import Curvature

WeightCriterion = Callable[[torch.Tensor, Curvature, Zeros], torch.Tensor]
"""`(weight_OI, curvature, zeros) -> weight_OI` in float32, with as many zeros."""

REFIT_STEPS = 8
"""Twenty are no better on held-out text."""


def magnitude(weight_OI: torch.Tensor, curvature: Curvature | None, zeros: Zeros) -> torch.Tensor:
    """The smallest weights of a layer become zero; the text does not matter."""
    weight_OI = weight_OI.float()
    return weight_OI.masked_fill(lowest(weight_OI.abs(), zeros), 0)


def wanda(weight_OI: torch.Tensor, curvature: Curvature, zeros: Zeros) -> torch.Tensor:
    """|w| times the norm of its input, compared within a row (Sun et al. 2024, eq. 1)."""
    weight_OI = weight_OI.float()
    scores_OI = weight_OI.abs() * curvature.damped_II.diagonal().sqrt()
    mask_OI = lowest(scores_OI, zeros) if zeros.group else lowest_in_rows(scores_OI, zeros.count)
    return weight_OI.masked_fill(mask_OI, 0)


WEIGHT_CRITERIA: dict[str, WeightCriterion] = {
    "splitting": splitting,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
    "magnitude": magnitude,  # type: ignore[dict-item]
}


def refit(sparse_OI: torch.Tensor, wanted_OI: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """Least squares on the weights that are left: where ||(W - W_hat) X||^2 is least.

    Conjugate gradients with a diagonal preconditioner, on all rows at once: each row has a
    linear system of its own, which would have to be factorized.

    Args:
        sparse_OI: where it starts from; its zeros stay.
        wanted_OI: W, full.
    """
    kept_OI = (sparse_OI != 0).float()
    damped_II, solution_OI = curvature.damped_II, sparse_OI
    residual_OI = ((wanted_OI.float() - solution_OI) @ damped_II).mul_(kept_OI)
    scaled_OI = residual_OI / damped_II.diagonal()
    direction_OI, power_O1 = scaled_OI, _dot(residual_OI, scaled_OI)
    for _ in range(REFIT_STEPS):
        curved_OI = (direction_OI @ damped_II).mul_(kept_OI)
        # A row that is solved has a direction of zero and stays where it is.
        step_O1 = power_O1 / _dot(direction_OI, curved_OI).clamp_min(TINY)
        solution_OI = solution_OI + step_O1 * direction_OI
        residual_OI = residual_OI - step_O1 * curved_OI
        scaled_OI = residual_OI / damped_II.diagonal()
        before_O1, power_O1 = power_O1, _dot(residual_OI, scaled_OI)
        direction_OI = scaled_OI + power_O1 / before_O1.clamp_min(TINY) * direction_OI
    return solution_OI


TINY = torch.finfo(torch.float32).tiny


def _dot(left_OI: torch.Tensor, right_OI: torch.Tensor) -> torch.Tensor:
    return (left_OI * right_OI).sum(1, keepdim=True)
