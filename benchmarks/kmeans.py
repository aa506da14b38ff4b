"""Weight sharing by k-means, a baseline: 2^b values a block or row of a weight, each weight the
nearest of them (Han et al. 2016, Deep Compression). No stock library stores it; NF4 is its stock
form, with one codebook for all and a scale a block.

Legend: O outputs (rows) of a weight, I inputs (columns), N groups that share values, C columns of
one, K values.
"""

from __future__ import annotations

import torch

ITERATIONS = 50


def share_values(
    weight_OI: torch.Tensor,
    bits: int,
    block: int = 0,
    importance_I: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight with at most 2^bits values in each block; same shape and dtype.

    Args:
        bits: of an index, 1 to 8.
        block: columns that share values; 0 for a whole row.
        importance_I: weight of each column's squared error, such as the Gram matrix's diagonal;
            at least 0 everywhere. Alike for all where it is None.
    """
    inputs = weight_OI.shape[1]
    columns = block or inputs
    if inputs % columns:
        raise ValueError(f"{inputs} columns are no multiple of a block of {columns}")
    values_NC = weight_OI.float().reshape(-1, columns)
    if importance_I is None:
        importance_I = torch.ones(inputs, device=weight_OI.device)
    mass_NC = importance_I.float().expand(weight_OI.shape).reshape(-1, columns)
    shared_NK, index_NC = _lloyd(values_NC, mass_NC, 2**bits)
    return shared_NK.gather(1, index_NC).view_as(weight_OI).to(weight_OI.dtype)


def bits_a_weight(bits: int, columns: int) -> float:
    """What a weight costs with its share of the 16-bit values, of which so many columns have
    2^bits."""
    return bits + 16 * 2**bits / columns


def _lloyd(
    values_NC: torch.Tensor, mass_NC: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, K] in ascending order, and each weight's index among them."""
    low_N1, high_N1 = values_NC.amin(1, keepdim=True), values_NC.amax(1, keepdim=True)
    # Evenly over the range, which keeps the few large weights: the best start in the paper.
    step_K = torch.linspace(0, 1, count, device=values_NC.device)
    shared_NK = low_N1 + (high_N1 - low_N1) * step_K
    index_NC = _nearest(values_NC, shared_NK)
    for _ in range(ITERATIONS):
        total_NK = torch.zeros_like(shared_NK).scatter_add_(1, index_NC, mass_NC)
        moment_NK = torch.zeros_like(shared_NK).scatter_add_(1, index_NC, mass_NC * values_NC)
        # A value that no weight is nearest to, or none that matters, stays where it is.
        shared_NK = torch.where(total_NK > 0, moment_NK / total_NK, shared_NK)
        before_NC, index_NC = index_NC, _nearest(values_NC, shared_NK)
        if torch.equal(before_NC, index_NC):
            break
    return shared_NK, index_NC


def _nearest(values_NC: torch.Tensor, shared_NK: torch.Tensor) -> torch.Tensor:
    middle_NK = (shared_NK[:, 1:] + shared_NK[:, :-1]) / 2
    return torch.searchsorted(middle_NK, values_NC)
