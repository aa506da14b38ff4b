"""Criteria: in which order the input columns of an output layer may go.

Each takes the layer's weight and Gram matrix and returns units in order of removal, the
cheapest first. The orders are nested, so one call serves every width down to the fewest
units that any caller wants to keep; below that the order may be arbitrary. Where units are
siblings (the query heads of one KV group), no family of them ever loses two more than
another. A criterion is one function and one line in `CRITERIA`.

Legend: O outputs, I inputs, U units (I = U * unit_width).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_compress.pruning.obs import obs_order

Criterion = Callable[[torch.Tensor, torch.Tensor, int, int, int], torch.Tensor]
"""`(weight_OI, gram_II, unit_width, fewest, siblings) -> order_U`, float64 in, int64 out."""


def magnitude(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    unit_width: int,
    fewest: int = 0,
    siblings: int = 1,
) -> torch.Tensor:
    """Squared norm of the outgoing weights; the text does not matter."""
    return _ascending(weight_OI.pow(2).sum(0), unit_width, siblings)


def wanda(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    unit_width: int,
    fewest: int = 0,
    siblings: int = 1,
) -> torch.Tensor:
    """Squared norm of the weights times the input's energy (Sun et al. 2024, eq. 1)."""
    return _ascending(weight_OI.pow(2).sum(0) * gram_II.diagonal(), unit_width, siblings)


def _ascending(scores_I: torch.Tensor, unit_width: int, siblings: int) -> torch.Tensor:
    order_U = scores_I.view(-1, unit_width).sum(1).argsort(stable=True)
    if siblings == 1:
        return order_U
    # All first losses of the families come first, then all second ones, ...
    rank_FS = order_U.argsort().view(-1, siblings).argsort(1).argsort(1)
    return order_U[rank_FS.flatten()[order_U].argsort(stable=True)]


CRITERIA: dict[str, Criterion] = {"obs": obs_order, "wanda": wanda, "magnitude": magnitude}
