"""Optimal Brain Surgeon order: what costs least once the rest has adapted to its loss.

Damped block OBS as in ZipLM (Kurtic et al. 2023) and SlimGPT (Ling et al. 2024). With
P = (G + lam mean(diag G) I)^-1, removing the columns B of W costs
tr(W_B (P_BB)^-1 W_B^T); the remaining columns absorb W_B (P_BB)^-1 P_B: and P loses B.

Legend: O outputs, I inputs, U units (I = U * unit_width).
"""

from __future__ import annotations

import torch

from hf_compress.errors import ModelError

SELECTION_DAMPING = 1e-4
"""Share of the mean diagonal. The choice wants far less damping than the fold: measured
on held-out text (SmolLM2-135M at 30 %), KL .631 at 1e-2, .624 at 1e-3, .618 at 1e-4."""
BLOCK = 16
"""Single columns removed between two updates of P; as good as one at a time."""
STANDS_IN = 0.1
"""Two columns that stand in for one another do not leave in one update: of the later one, the
diagonal of P may fall to this share when the earlier ones have left, and no further."""
COMPACT = 0.75
"""Share of the columns still alive under which the others are dropped from memory."""


def obs_order(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    unit_width: int,
    fewest: int = 0,
    siblings: int = 1,
    damping: float = SELECTION_DAMPING,
) -> torch.Tensor:
    """Units in order of removal, int64 [U]; the last `fewest` in no particular order.

    Of families of `siblings` units each, none loses another before all have lost as many.
    """
    if unit_width == 1:
        # Once inverted, the sweep's own rounding in float32 changes no score that matters.
        inverse_II = damped_inverse(gram_II, damping).float()
        return _order_columns(weight_OI.to(torch.float32, copy=True), inverse_II, fewest)
    inverse_II = damped_inverse(gram_II, damping)
    return _order_groups(weight_OI.clone(), inverse_II, unit_width, siblings)


def damped_inverse(gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """(G + damping * mean(diag G) I)^-1.

    Raises:
        ModelError: G is zero or not positive definite even so.
    """
    mean = gram_II.diagonal().mean()
    damped_II = gram_II.clone()
    damped_II.diagonal().add_(damping * mean)
    factor_II, info = torch.linalg.cholesky_ex(damped_II)
    del damped_II  # such matrices in float64 are most of what pruning a block needs
    if info.item() or not mean > 0:
        raise ModelError(
            f"a Gram matrix with mean diagonal {mean.item():.3g} is not positive definite at "
            f"damping {damping:g}; the calibration text gives this layer nothing to learn from. "
            "Use more or other text"
        )
    return torch.cholesky_inverse(factor_II, out=factor_II)


def _order_columns(weight_OI: torch.Tensor, inverse_II: torch.Tensor, fewest: int) -> torch.Tensor:
    """Both arguments are overwritten. Columns that left stay in place, as zeros, until
    they are many: copying what remains costs more than the update itself."""
    alive_I = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    gone_I = torch.zeros_like(alive_I, dtype=torch.bool)
    order: list[torch.Tensor] = []
    remaining = len(alive_I)
    while remaining > fewest:
        scores_I = weight_OI.pow(2).sum(0) / inverse_II.diagonal()
        scores_I[gone_I] = torch.inf
        leaving = scores_I.argsort(stable=True)[: min(BLOCK, remaining - fewest)]
        leaving = leaving[_apart(inverse_II[leaving][:, leaving])]
        order.append(alive_I[leaving])
        inverse_BI = inverse_II[leaving]
        absorb_BI = torch.linalg.solve(inverse_BI[:, leaving], inverse_BI)
        weight_OI.addmm_(weight_OI[:, leaving], absorb_BI, alpha=-1)
        inverse_II.addmm_(inverse_BI.T, absorb_BI, alpha=-1)
        gone_I[leaving] = True
        remaining -= len(leaving)
        if remaining < COMPACT * len(alive_I):
            staying = (~gone_I).nonzero().flatten()
            alive_I, gone_I = alive_I[staying], gone_I[staying]
            weight_OI, inverse_II = weight_OI[:, staying], inverse_II[staying][:, staying]
    return torch.cat([*order, alive_I[~gone_I]])


def _apart(inverse_BB: torch.Tensor) -> torch.Tensor:
    """Which of the columns that are about to leave, in this order, still can when those before
    them have: where two do the same, each is cheap only as long as the other stays."""
    # The pivots are the diagonal of P as it would be when the columns before have been removed.
    # Of a singular P some are NaN, or zero: these stay as well.
    pivots_B = torch.linalg.cholesky_ex(inverse_BB.double())[0].diagonal().square()
    apart_B = pivots_B >= STANDS_IN * inverse_BB.diagonal()
    apart_B[0] = True
    return apart_B


def _order_groups(
    weight_OI: torch.Tensor, inverse_II: torch.Tensor, unit_width: int, siblings: int
) -> torch.Tensor:
    alive = list(range(weight_OI.shape[1] // unit_width))
    lost = [0] * (len(alive) // siblings)
    order: list[int] = []
    columns = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    while len(alive) > 1:
        losses = {}
        for position, unit in enumerate(alive):
            if siblings > 1 and lost[unit // siblings] > min(lost):
                continue
            mine = columns[position * unit_width : (position + 1) * unit_width]
            weight_OB = weight_OI[:, mine]
            solved_BO = torch.linalg.solve(inverse_II[mine][:, mine], weight_OB.T)
            losses[position] = (weight_OB.T * solved_BO).sum().item()
        position = min(losses, key=losses.__getitem__)
        order.append(alive.pop(position))
        lost[order[-1] // siblings] += 1
        leaving = columns[position * unit_width : (position + 1) * unit_width]
        staying = _complement(leaving, weight_OI.shape[1])
        weight_OI, inverse_II = _eliminate(weight_OI, inverse_II, leaving, staying)
    return torch.tensor(order + alive, device=weight_OI.device)


def _eliminate(
    weight_OI: torch.Tensor, inverse_II: torch.Tensor, leaving: torch.Tensor, staying: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """W and P of the columns that stay, after the others have been optimally removed."""
    inverse_BS = inverse_II[leaving][:, staying]
    absorb_BS = torch.linalg.solve(inverse_II[leaving][:, leaving], inverse_BS)
    weight_OS = weight_OI[:, staying].addmm_(weight_OI[:, leaving], absorb_BS, alpha=-1)
    inverse_SS = inverse_II[staying][:, staying].addmm_(inverse_BS.T, absorb_BS, alpha=-1)
    return weight_OS, inverse_SS


def _complement(leaving: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool, device=leaving.device)
    mask[leaving] = False
    return mask.nonzero().flatten()
