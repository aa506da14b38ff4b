"""Rounds that together remove what was asked."""

from __future__ import annotations

import math

import pytest

from hf_compress.pruning import round_sparsities


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_what_the_rounds_leave_is_what_one_would(sparsity: float, rounds: int) -> None:
    shares = round_sparsities(sparsity, rounds)
    assert len(shares) == rounds
    assert math.prod(1 - share for share in shares) == pytest.approx(1 - sparsity)
    assert max(shares) == pytest.approx(min(shares))


def test_one_round_is_the_whole() -> None:
    assert round_sparsities(0.3, 1) == pytest.approx([0.3])


@pytest.mark.parametrize(("sparsity", "rounds"), [(1.0, 2), (-0.1, 2), (0.3, 0)])
def test_impossible_rounds(sparsity: float, rounds: int) -> None:
    with pytest.raises(ValueError, match="at least one round"):
        round_sparsities(sparsity, rounds)
