"""Masks and weights together, by splitting: alternate between fitting and zeroing.

ADMM on ||(W - W_hat) X||^2 with W_hat sparse, as in Boza 2024 and ALPS (Meng et al. 2024): a
full matrix A follows the fit, a sparse one Z the pattern, and their difference D is summed up
and pulls them together. Each round chooses the mask anew, and the share of zeros grows over
the first rounds, so that weights that go late know what went before.

Ours: everything is in units in which a weight's square is what zeroing it costs once the rest
has adapted, w^2 / (H^-1)_jj (published: w^2 G_jj). Measured on SmolLM2-135M, half of the
weights: held-out error of a layer .82 of SparseGPT's (published units .84).

Legend: O outputs (rows), I inputs (columns).
"""

from __future__ import annotations

import torch

from hf_compress.pruning.masks import Zeros, about_lowest_of_all, lowest
from hf_compress.regression.curvature import Curvature

ROUNDS = 12
GROWING = 9
"""Rounds over which the share of zeros grows to what is asked."""


def splitting(weight_OI: torch.Tensor, curvature: Curvature, zeros: Zeros) -> torch.Tensor:
    """The weight [O, I] with zeros, the rest adapted to them; float32."""
    scale_I, split_II = curvature.scale_I, curvature.split_II
    scaled_OI = weight_OI.float() * scale_I
    curved_II = curvature.damped_II / scale_I / scale_I[:, None]
    pull = curved_II.diagonal().mean().item()
    target_OI = scaled_OI @ curved_II
    sparse_OI, difference_OI = scaled_OI, torch.zeros_like(scaled_OI)
    for round_ in range(1, ROUNDS + 1):
        full_OI = torch.add(target_OI, sparse_OI - difference_OI, alpha=pull) @ split_II
        difference_OI += full_OI
        sparse_OI = difference_OI.masked_fill(_mask(difference_OI, zeros, round_), 0)
        difference_OI -= sparse_OI
    return sparse_OI / scale_I


def _mask(scaled_OI: torch.Tensor, zeros: Zeros, round_: int) -> torch.Tensor:
    scores_OI = scaled_OI.abs()
    missing = max(0.0, 1 - round_ / GROWING) ** 3
    if not missing:
        return lowest(scores_OI, zeros)
    early_OI = about_lowest_of_all(scores_OI, (1 - missing) * zeros.count / scores_OI.numel())
    return early_OI & lowest(scores_OI, zeros) if zeros.group else early_OI
