"""Errors of all widths from one factorization, and KL of many genomes in one walk."""

from __future__ import annotations

import pytest
import torch

from hf_compress.evaluation import measure_divergence
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.divergence import next_tokens
from hf_compress.model.surgery import Dimensions
from hf_compress.pruning import Templates
from hf_compress.pruning.layer import PROBE_DAMPING, OutputLayer
from hf_compress.recipe import Prune
from hf_compress.search.database import Database
from hf_compress.search.evaluator import Evaluator
from hf_compress.search.scores import probe_genomes, score_levels
from hf_compress.statistics import Moments
from tests.search.conftest import Ready
from tests.search.test_costs import some_genome
from tests.tiny import random_ids


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_one_factorization_gives_the_error_of_every_width(ready: Ready, kind: str) -> None:
    block = ready.model.model.layers[1]
    seen, settings = ready.statistics.block(1), Prune(sparsity=0.5)
    family, dims = ready.source.family, Dimensions.of(ready.model.config)
    if kind == "attention":
        layer = OutputLayer.attention(block, family, dims, Moments(seen.attention), settings)
    else:
        layer = OutputLayer.mlp(block, family, Moments(seen.mlp), settings, 0)
    errors = layer.errors(PROBE_DAMPING)
    assert errors[0] == pytest.approx(1)
    assert errors[-1] == pytest.approx(0, abs=1e-9)
    assert (errors.diff() <= 1e-9).all()
    lam = PROBE_DAMPING * layer.total.gram_II.diagonal().mean()
    for units in (1, len(errors) // 2):
        shrunk = layer.shrink(units, PROBE_DAMPING)
        columns = torch.cat(
            [shrunk.units * layer.unit_width + at for at in range(layer.unit_width)]
        )
        problem = layer.total.on(columns)
        folded = problem.fold(PROBE_DAMPING)
        moved = (folded - problem.weight_OS).square().sum() * lam
        expected = (problem.error(folded) + moved.item()) / problem.energy
        assert errors[units].item() == pytest.approx(expected, rel=1e-6)


def test_kl_of_many_genomes_is_that_of_each(ready: Ready) -> None:
    evaluator = Evaluator(ready.database, random_ids(4, 24, seed=5))
    genomes = [ready.space.dense, *(some_genome(ready.space, seed) for seed in range(4))]
    genomes.append(genomes[2])
    together = evaluator.kl(genomes)
    assert together.shape == (6, 4)
    assert together[0].abs().max() < 1e-5
    assert torch.equal(together[2], together[5])
    for genome, kl_N in zip(genomes, together, strict=True):
        torch.testing.assert_close(evaluator.kl([genome])[0], kl_N)


def test_kl_is_that_of_the_model_that_the_plan_makes(ready: Ready) -> None:
    ids_NL = random_ids(4, 24, seed=5)
    for seed in range(4):
        genome = some_genome(ready.space, seed)
        plan = ready.space.plan(genome, ready.model.config)
        templates = Templates(ready.source, plan)
        state = dict(ready.model.state_dict())
        for index, position in plan.positions.items():
            state |= _tensors(ready, index, position, genome)
        model = templates.model.to_empty(device="cpu")
        missing = model.load_state_dict(
            {name: value for name, value in state.items() if name in model.state_dict()},
            strict=True,
        )
        assert not missing.missing_keys
        rotary = type(ready.model.model.rotary_emb)(model.config)
        model.model.rotary_emb = rotary
        found = measure_divergence(ready.source, ModelInMemory(model), next_tokens(ids_NL))
        kl = Evaluator(ready.database, ids_NL).kl([genome])[0]
        torch.testing.assert_close(found.kl_N, kl, rtol=1e-3, atol=1e-5)


def _tensors(ready: Ready, index: int, position: int, genome) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Of one block at its widths, under the names that they have in the smaller model."""
    groups, neurons = ready.space.units(genome, index)
    whole = ready.space.units(ready.space.dense, index)
    block = ready.model.model.layers[index]
    cut = ready.database.cut(block, index, groups or whole[0], neurons or whole[1])
    return {f"model.layers.{position}.{name}": value for name, value in cut.state_dict().items()}


def test_weights_are_kept_and_rebuilt(ready: Ready, tmp_path) -> None:  # type: ignore[no-untyped-def]
    args = ready.source, ready.statistics, ready.space, Prune(sparsity=0.5)
    database = Database(*args, ready.database._folder, tmp_path)
    block = ready.model.model.layers[0]
    first = database.shrunk(block, 0, "mlp", 48)
    (file,) = tmp_path.iterdir()
    again = database.shrunk(block, 0, "mlp", 48)
    assert torch.equal(first.weight_OS, again.weight_OS)
    file.unlink()
    assert torch.equal(database.shrunk(block, 0, "mlp", 48).weight_OS, first.weight_OS)


def test_scores_are_the_measured_kl_where_it_was_measured(ready: Ready) -> None:
    evaluator = Evaluator(ready.database, random_ids(4, 24, seed=5))
    scores = score_levels(ready.database, evaluator)
    probes = probe_genomes(ready.space)
    measured = evaluator.kl(list(probes.values())).mean(1)
    close = 0
    for (at, level), kl in zip(probes, measured.tolist(), strict=True):
        assert scores[at][level] >= kl - 1e-9  # a wider level that measured worse lifts it
        close += scores[at][level] == pytest.approx(kl)
    assert close > len(probes) / 2
    for of in scores:
        assert of[-1] == 0
        assert (of[:-1] >= of[1:]).all()
