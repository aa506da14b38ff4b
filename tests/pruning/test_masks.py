"""Masks: exactly as many as asked, whatever finds them."""

from __future__ import annotations

import pytest
import torch

from hf_compress.pruning.masks import (
    about_lowest_of_all,
    lowest_in_groups,
    lowest_in_rows,
    lowest_of_all,
)


def test_ties_change_no_count() -> None:
    scores = torch.ones(7, 12)
    assert int(lowest_of_all(scores, 31).sum()) == 31
    rows = lowest_in_rows(scores, 31).sum(1)
    assert rows.sum() == 31
    assert rows.max() - rows.min() == 1


@pytest.mark.parametrize("group", [2, 4, 8, 12])
def test_short_and_long_groups_are_ranked_alike(group: int) -> None:
    scores = torch.randint(0, 3, (6, 5 * group), generator=torch.Generator().manual_seed(group))
    mask_OGM = lowest_in_groups(scores.float(), group, group // 2).view(6, 5, group)
    stable = scores.view(6, 5, group).argsort(dim=-1, stable=True)[..., : group // 2]
    assert torch.equal(mask_OGM.nonzero()[:, 2].view_as(stable), stable.sort(-1).values)


def test_a_sample_finds_about_the_lowest_of_a_large_layer() -> None:
    scores = torch.rand(256, 576, generator=torch.Generator().manual_seed(0))
    assert abs(about_lowest_of_all(scores, 0.3).float().mean() - 0.3) < 0.02
    small = scores[:8, :8]
    assert about_lowest_of_all(small, 0.25).sum() == 16
