"""The k-means baseline of the quantization benchmark."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kmeans import bits_a_weight, share_values


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("bits", [2, 4])
def test_few_values_each_the_mean_of_its_weights(bits: int, block: int) -> None:
    before = weight().view(-1, block or 128)
    after = share_values(weight(), bits, block).view_as(before)
    for row, shared in zip(before, after, strict=True):
        values = shared.unique()
        assert len(values) <= 2**bits
        assert torch.equal(values[(row[:, None] - values).abs().argmin(1)], shared)
        means = torch.stack([row[shared == value].mean() for value in values])
        assert torch.allclose(means, values, atol=1e-6)


def test_more_values_lose_less() -> None:
    lost = [(share_values(weight(), bits) - weight()).square().mean() for bits in (1, 2, 3, 4)]
    assert lost == sorted(lost, reverse=True)
    even = torch.linspace(-1, 1, 16) * weight().abs().amax(1, keepdim=True)
    rounded = torch.gather(even, 1, (weight()[:, :, None] - even[:, None]).abs().argmin(2))
    assert lost[-1] < (rounded - weight()).square().mean()


def test_what_has_few_values_stays() -> None:
    few = weight().sign().bfloat16()
    assert torch.equal(share_values(few, 1), few)
    assert torch.equal(share_values(torch.zeros(2, 8), 2), torch.zeros(2, 8))


def test_columns_that_matter_lose_less() -> None:
    importance = torch.logspace(0, 4, 128)
    plain, weighted = share_values(weight(), 2), share_values(weight(), 2, importance_I=importance)
    error = [((found - weight()).square() * importance).sum() for found in (plain, weighted)]
    assert error[1] < 0.95 * error[0]
    assert torch.isfinite(share_values(weight(), 2, importance_I=torch.zeros(128))).all()


def test_size_and_shape() -> None:
    assert bits_a_weight(4, 576) == pytest.approx(4 + 256 / 576)
    with pytest.raises(ValueError, match="128 columns are no multiple of a block of 48"):
        share_values(weight(), 2, 48)
