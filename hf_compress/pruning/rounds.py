"""Pruning in rounds: how much of what is left each round removes."""

from __future__ import annotations


def round_sparsities(sparsity: float, rounds: int) -> list[float]:
    """Share of what is left that each of `rounds` removes, so that `sparsity` of the whole is
    gone in the end: the kept share falls geometrically, so each round asks as much of the
    model as the one before.

    Raises:
        ValueError: a sparsity outside of [0, 1), or no rounds.
    """
    if not 0 <= sparsity < 1 or rounds < 1:
        raise ValueError(
            f"{rounds} rounds to sparsity {sparsity:g}: give at least one round, and a sparsity "
            "from 0 up to, but not including, 1"
        )
    return [1 - (1 - sparsity) ** (1 / rounds)] * rounds
