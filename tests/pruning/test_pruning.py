"""Criteria, OBS and folding on matrices whose answers are known."""

from __future__ import annotations

import pytest
import torch

from hf_compress.calibration.collect import accumulate_gram
from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.obs import obs_order
from hf_compress.regression.fold import DAMPINGS, Regression, choose_damping


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


@pytest.mark.parametrize("criterion", CRITERIA)
def test_siblings_lose_in_turns(criterion: str, layer) -> None:
    weight, inputs = layer
    order = CRITERIA[criterion](weight, inputs @ inputs.T, 4, 0, 2).tolist()
    assert sorted(order) == list(range(8))
    assert sorted(unit // 2 for unit in order[:4]) == [0, 1, 2, 3]


def own(weight: torch.Tensor, inputs: torch.Tensor) -> Regression:
    """The layer's own output on `inputs` as target."""
    return Regression.of_own_output(weight, (inputs @ inputs.T).double())


def test_folding_is_the_least_squares_optimum(layer) -> None:
    weight, inputs = layer
    kept = torch.arange(0, 32, 2)
    folded = own(weight, inputs).on(kept).fold(1e-12)
    best = torch.linalg.lstsq(inputs[kept].T, (weight @ inputs).T).solution.T
    torch.testing.assert_close(folded @ inputs[kept], best @ inputs[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_target_between_the_own_output_and_another(share: float, layer) -> None:
    weight, inputs = layer
    generator = torch.Generator().manual_seed(5)
    other = torch.randn(12, 400, generator=generator, dtype=torch.float64)
    target = (1 - share) * weight @ inputs + share * other
    problem = own(weight, inputs).toward(other @ inputs.T, other.square().sum().item(), share)
    kept = torch.arange(0, 32, 2)
    folded = problem.on(kept).fold(1e-12)
    best = torch.linalg.lstsq(inputs[kept].T, target.T).solution.T
    torch.testing.assert_close(folded @ inputs[kept], best @ inputs[kept], rtol=1e-5, atol=1e-5)
    for weight_OS in (folded, weight[:, kept]):
        error = (target - weight_OS @ inputs[kept]).square().sum().item()
        assert problem.on(kept).error(weight_OS) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("damping", [1e-4, 1e-1, 10.0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_folding_never_has_the_larger_error(damping: float, criterion: str, layer) -> None:
    weight, inputs = layer
    problem = own(weight, inputs)
    kept = CRITERIA[criterion](weight, problem.gram_II, 1)[12:].sort().values
    dropped = problem.on(kept).error(weight[:, kept])
    assert problem.on(kept).error(problem.on(kept).fold(damping)) <= dropped


def test_strong_damping_shrinks_toward_the_original_weights(layer) -> None:
    weight, inputs = layer
    kept = torch.arange(20)
    folded = own(weight, inputs).on(kept).fold(1e9)
    torch.testing.assert_close(folded, weight[:, kept], rtol=1e-5, atol=1e-5)


def test_a_duplicate_is_merged_without_error_and_is_first_to_go(layer) -> None:
    weight, inputs = layer
    inputs = inputs + torch.randn(32, 400, generator=torch.Generator().manual_seed(1))
    inputs[7] = inputs[3]
    problem = own(weight, inputs)
    assert CRITERIA["obs"](weight, problem.gram_II, 1)[0].item() in (3, 7)
    kept = torch.tensor([index for index in range(32) if index != 7])
    folded = problem.on(kept).fold(1e-10)
    expected = weight[:, kept].clone()
    expected[:, 3] += weight[:, 7]
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)


def test_obs_beats_the_baselines_after_folding(layer) -> None:
    weight, inputs = layer
    problem = own(weight, inputs)

    def error(criterion: str) -> float:
        kept = CRITERIA[criterion](weight, problem.gram_II, 1)[16:].sort().values
        return problem.on(kept).error(problem.on(kept).fold(1e-3))

    assert error("obs") < error("wanda")
    assert error("obs") < error("magnitude")


def halves_of(weight: torch.Tensor, tokens: int, generator: torch.Generator):
    mixing = torch.randn(24, 24, generator=generator)
    noise = torch.randn(2, 24, tokens, generator=generator)
    return tuple(own(weight, mixing @ half) for half in noise)


def test_noise_asks_for_more_damping_than_plenty_of_text() -> None:
    weight = torch.randn(8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few, many = (
        choose_damping(
            halves_of(weight, tokens, torch.Generator().manual_seed(1)), torch.arange(16)
        )
        for tokens in (20, 20000)
    )
    assert few > many


def test_the_damping_found_downhill_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(1)
    for tokens in (20, 60, 200, 2000):
        weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
        kept = torch.arange(16)
        halves = halves_of(weight, tokens, generator)
        errors = {
            damping: sum(
                held_out.on(kept).error(fitted.on(kept).fold(damping))
                for fitted, held_out in (halves, halves[::-1])
            )
            for damping in DAMPINGS
        }
        assert choose_damping(halves, kept) == min(errors, key=lambda d: errors[d])


def test_an_order_cut_short_keeps_the_same_units(layer) -> None:
    weight, inputs = layer
    gram = inputs @ inputs.T
    whole, short = (obs_order(weight, gram, 1, fewest) for fewest in (0, 16))
    assert whole[:16].tolist() == short[:16].tolist()
    assert sorted(short.tolist()) == list(range(32))


def test_gram_matrices_are_sums_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 64, 400, generator=generator).bfloat16()
    gram = torch.zeros(400, 400)
    accumulate_gram(gram, inputs.flatten(0, 1))
    flat = inputs.flatten(0, 1).double()
    exact = (flat.T @ flat).triu()
    torch.testing.assert_close(gram.triu().double(), exact, rtol=1e-5, atol=1e-3)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
