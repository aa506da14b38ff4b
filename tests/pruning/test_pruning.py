"""Criteria, OBS and folding on matrices whose answers are known."""

from __future__ import annotations

import pytest
import torch

from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.fold import choose_damping, fold, output_error
from hf_compress.statistics import GramPair


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [12, 32] and inputs [32, 400] with correlated columns, float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 20, generator=generator, dtype=torch.float64)
    inputs = mixing @ torch.randn(20, 400, generator=generator, dtype=torch.float64)
    inputs += 0.1 * torch.randn(32, 400, generator=generator, dtype=torch.float64)
    return torch.randn(12, 32, generator=generator, dtype=torch.float64), inputs


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("unit_width", [1, 4])
def test_an_order_names_every_unit_once(criterion: str, unit_width: int, layer) -> None:
    weight, inputs = layer
    order = CRITERIA[criterion](weight, inputs @ inputs.T, unit_width)
    assert sorted(order.tolist()) == list(range(32 // unit_width))


def test_folding_is_the_least_squares_optimum(layer) -> None:
    weight, inputs = layer
    kept = torch.arange(0, 32, 2)
    folded = fold(weight, inputs @ inputs.T, kept, 1e-12)
    best = torch.linalg.lstsq(inputs[kept].T, (weight @ inputs).T).solution.T
    torch.testing.assert_close(folded @ inputs[kept], best @ inputs[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damping", [1e-4, 1e-1, 10.0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_folding_never_has_the_larger_error(damping: float, criterion: str, layer) -> None:
    weight, inputs = layer
    gram = inputs @ inputs.T
    kept = CRITERIA[criterion](weight, gram, 1)[12:].sort().values
    dropped = output_error(weight, gram, kept, weight[:, kept])
    assert output_error(weight, gram, kept, fold(weight, gram, kept, damping)) <= dropped


def test_strong_damping_shrinks_toward_the_original_weights(layer) -> None:
    weight, inputs = layer
    kept = torch.arange(20)
    folded = fold(weight, inputs @ inputs.T, kept, 1e9)
    torch.testing.assert_close(folded, weight[:, kept], rtol=1e-5, atol=1e-5)


def test_a_duplicate_is_merged_without_error_and_is_first_to_go(layer) -> None:
    weight, inputs = layer
    inputs = inputs + torch.randn(32, 400, generator=torch.Generator().manual_seed(1))
    inputs[7] = inputs[3]
    gram = inputs @ inputs.T
    assert CRITERIA["obs"](weight, gram, 1)[0].item() in (3, 7)
    kept = torch.tensor([index for index in range(32) if index != 7])
    folded = fold(weight, gram, kept, 1e-10)
    expected = weight[:, kept].clone()
    expected[:, 3] += weight[:, 7]
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)


def test_obs_beats_the_baselines_after_folding(layer) -> None:
    weight, inputs = layer
    gram = inputs @ inputs.T

    def error(criterion: str) -> float:
        kept = CRITERIA[criterion](weight, gram, 1)[16:].sort().values
        return output_error(weight, gram, kept, fold(weight, gram, kept, 1e-3))

    assert error("obs") < error("wanda")
    assert error("obs") < error("magnitude")


def test_noise_asks_for_more_damping_than_plenty_of_text() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)

    def chosen(tokens: int) -> float:
        halves = [torch.randn(24, tokens, generator=generator) for _ in range(2)]
        return choose_damping(weight, GramPair(*(x @ x.T for x in halves)), torch.arange(16))

    assert chosen(20) > chosen(20000) or chosen(20) == 0.3
