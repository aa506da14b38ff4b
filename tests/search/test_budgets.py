"""Budgets as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hf_compress.recipe import Budget, Search


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        ({"parameters": 0.5}, 100.0),
        ({"parameters": "0.15K"}, 150.0),
        ({"parameters": "120"}, 120.0),
        ({"weight_bytes": "1.5 MB"}, 1.5e6),
        ({"kv_bytes_per_token": "12 KiB"}, 12 * 1024.0),
        ({"flops_per_token": "2 MFLOPs"}, 2e6),
        ({"decode_latency": "12ms"}, 0.012),
        ({"prefill_latency": "1.5 s"}, 1.5),
    ],
)
def test_shares_and_amounts(budget: dict[str, Any], limit: float) -> None:
    (name,) = budget
    assert Budget(**budget).limits({name: 200.0}) == {name: pytest.approx(limit)}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "names no budget"),
        ({"parameters": 1.5}, "needs a unit"),
        ({"parameters": 0}, "between 0 and 1"),
        ({"parameters": True}, "neither a share nor an amount"),
        ({"weight_bytes": "12 parsecs"}, "KB, MB, GB"),
        ({"decode_latency": "12"}, "US, MS, S"),
        ({"decode_latency": "-3 ms"}, "not a positive number"),
        ({"speed": 0.5}, "Extra inputs"),
    ],
)
def test_what_is_no_budget(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Budget(**budget)


@pytest.mark.parametrize(
    ("uniform", "structure"), [(True, "attention_sublayers"), (False, "layers")]
)
def test_structures_that_do_not_go_with_uniform(uniform: bool, structure: str) -> None:
    with pytest.raises(ValidationError, match=f"structures names {structure}"):
        Search(budget={"parameters": 0.5}, uniform=uniform, structures=[structure])
