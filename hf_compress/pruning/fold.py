"""Folding: removed columns live on in the kept ones.

W_hat = W_S + W_R G_RS (G_SS + lam mean(diag G) I)^-1, the least-squares optimum that shrinks
toward the original W_S and not toward zero. Merging two identical neurons is the special
case G_RS = G_SS.

Legend: O outputs, I inputs, S kept input columns, R removed ones.
"""

from __future__ import annotations

import torch

from hf_compress.statistics import GramPair

DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Shares of the mean diagonal that `choose_damping` considers, in order."""
START = 4
"""Index of the damping that wins most often, from which the search goes downhill."""


def fold(
    weight_OI: torch.Tensor, gram_II: torch.Tensor, kept_S: torch.Tensor, damping: float
) -> torch.Tensor:
    """Weight [O, S] on the kept columns that best replaces W on all of them, float64."""
    removed_R = _removed(kept_S, weight_OI.shape[1])
    if not len(removed_R):
        return weight_OI[:, kept_S]
    system_SS = gram_II[kept_S][:, kept_S]
    system_SS.diagonal().add_(damping * gram_II.diagonal().mean())
    target_SO = (weight_OI[:, removed_R] @ gram_II[removed_R][:, kept_S]).T
    return (
        weight_OI[:, kept_S] + torch.cholesky_solve(target_SO, torch.linalg.cholesky(system_SS)).T
    )


def output_error(
    weight_OI: torch.Tensor, gram_II: torch.Tensor, kept_S: torch.Tensor, folded_OS: torch.Tensor
) -> float:
    """||W X - W_hat X_S||^2 on the inputs that made G."""
    difference_OI = weight_OI.clone()
    difference_OI[:, kept_S] -= folded_OS
    return output_energy(difference_OI, gram_II)


def output_energy(weight_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    """||W X||^2 on the inputs that made G."""
    return ((weight_OI @ gram_II) * weight_OI).sum().item()


def choose_damping(weight_OI: torch.Tensor, pair: GramPair, kept_S: torch.Tensor) -> float:
    """The damping with the least error on one half of the text when folded on the other.

    The error falls and then rises with the damping, so walking downhill from the usual
    winner finds the least after two or three trials.
    """
    halves = (pair.first_II.double(), pair.second_II.double())
    errors: dict[int, float] = {}

    def error(position: int) -> float:
        if position not in errors:
            errors[position] = sum(
                _held_out_error(weight_OI, fitted_II, held_out_II, kept_S, DAMPINGS[position])
                for fitted_II, held_out_II in (halves, halves[::-1])
            )
        return errors[position]

    best = START
    for step in (-1, 1):
        while 0 <= best + step < len(DAMPINGS) and error(best + step) < error(best):
            best += step
    return DAMPINGS[best]


def _held_out_error(
    weight_OI: torch.Tensor,
    fitted_II: torch.Tensor,
    held_out_II: torch.Tensor,
    kept_S: torch.Tensor,
    damping: float,
) -> float:
    folded_OS = fold(weight_OI, fitted_II, kept_S, damping)
    # Errors that are compared differ by far more than float32 rounds off.
    return output_error(weight_OI.float(), held_out_II.float(), kept_S, folded_OS.float())


def _removed(kept_S: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool, device=kept_S.device)
    mask[kept_S] = False
    return mask.nonzero().flatten()
