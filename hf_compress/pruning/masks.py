"""Which weights of a linear layer go: the lowest scores, exactly as many as asked.

All functions take scores [O, I] and return a mask [O, I] that is true where a weight goes.
Ties are broken by position, so that equal scores cannot change a count.

Legend: O outputs (rows), I inputs (columns), M weights in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

STRIDE = 31
"""Prime, so that every column of a layer is in the sample."""
LARGE = 1 << 16
"""Weights of a layer from which on a sample says enough."""
SHORT = 8


@dataclass(frozen=True)
class Zeros:
    """How many weights of one layer become zero, and where they may lie.

    Attributes:
        count: weights that become zero.
        group: consecutive weights of a row, of which each group loses `removed`; 0 where
            zeros may lie anywhere.
        removed: zeros in a group.
    """

    count: int
    group: int = 0
    removed: int = 0

    @classmethod
    def of(cls, pattern: str, share: float, weight_OI: torch.Tensor) -> Zeros:
        """`unstructured` with a share of the weights, or `N:M`, which is its own share."""
        if pattern == "unstructured":
            return cls(round(share * weight_OI.numel()))
        keep, group = map(int, pattern.split(":"))
        return cls(weight_OI.numel() // group * (group - keep), group, group - keep)


def lowest(scores_OI: torch.Tensor, zeros: Zeros) -> torch.Tensor:
    """In each group, or else in the whole layer."""
    if zeros.group:
        return lowest_in_groups(scores_OI, zeros.group, zeros.removed)
    return lowest_of_all(scores_OI, zeros.count)


def lowest_of_all(scores_OI: torch.Tensor, count: int) -> torch.Tensor:
    """`count` weights wherever they lie."""
    flat = scores_OI.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        threshold = flat.kthvalue(count).values
        mask = flat < threshold
        ties = (flat == threshold).nonzero().flatten()
        mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores_OI)


def about_lowest_of_all(scores_OI: torch.Tensor, share: float) -> torch.Tensor:
    """About this share of the weights, wherever they lie: the threshold is that of every
    `STRIDE`-th of them."""
    flat = scores_OI.flatten()
    sample = flat[:: STRIDE if len(flat) > LARGE else 1]
    return scores_OI < sample.kthvalue(min(len(sample), round(share * len(sample)) + 1)).values


def lowest_in_rows(scores_OI: torch.Tensor, count: int) -> torch.Tensor:
    """`count` weights, the same number in every row, or one more."""
    rows = scores_OI.shape[0]
    upto = torch.arange(1, rows + 1, device=scores_OI.device) * count // rows
    count_O1 = upto.diff(prepend=upto.new_zeros(1))[:, None]
    return _ranks(scores_OI) < count_O1


def lowest_in_groups(scores_OI: torch.Tensor, group: int, removed: int) -> torch.Tensor:
    """`removed` weights of every `group` consecutive ones of a row."""
    scores_OGM = scores_OI.reshape(scores_OI.shape[0], -1, group)
    return (_ranks(scores_OGM) < removed).reshape(scores_OI.shape)


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Position of each score in its row, from the lowest."""
    if scores.shape[-1] <= SHORT:
        return _counted_ranks(scores)
    order = scores.argsort(dim=-1, stable=True)
    positions = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def _counted_ranks(scores: torch.Tensor) -> torch.Tensor:
    """The same by comparing all pairs, which is faster in short rows."""
    columns = [column.contiguous() for column in scores.unbind(-1)]
    ranks = torch.zeros(len(columns), *columns[0].shape, dtype=torch.uint8, device=scores.device)
    for right in range(1, len(columns)):
        for left in range(right):
            later = columns[left] <= columns[right]
            ranks[right] += later
            ranks[left] += ~later
    return ranks.movedim(0, -1)
