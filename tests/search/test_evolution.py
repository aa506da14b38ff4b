"""Children keep the budgets; a search that was killed goes on as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hf_compress.search.evolution import (
    Progress,
    Settings,
    evolve,
    fill,
    load_progress,
    mutate,
    offspring,
    save_progress,
)
from hf_compress.search.space import Genome
from tests.search.conftest import Ready

SETTINGS = Settings(generations=12, offspring=6, survivors=(2,), patience=12, seed=0)


class Distance:
    """Stands where an evaluator was: the distance to a genome that nobody knows."""

    def __init__(self, hidden: Genome) -> None:
        self.hidden = hidden
        self.measured = 0

    def kl(self, genomes: Sequence[Genome]) -> torch.Tensor:
        self.measured += len(genomes)
        return torch.tensor(
            [
                [float(sum(abs(a - b) for a, b in zip(genome, self.hidden, strict=True)))]
                for genome in genomes
            ]
        )


def limits_of(ready: Ready, share: float) -> dict[str, float]:
    names = ("non_embedding_parameters", "kv_bytes_per_token")
    return {name: share * ready.costs.dense[name] for name in names}


def start_of(ready: Ready, limits: dict[str, float]) -> Genome:
    return fill(ready.space.nearest(1, 16), ready.costs, limits, random.Random(0))


@pytest.mark.parametrize("seed", range(20))
def test_children_keep_the_budgets_and_spend_them(ready: Ready, seed: int) -> None:
    limits = limits_of(ready, 0.7)
    rng = random.Random(seed)
    parent = start_of(ready, limits)
    child = mutate(parent, ready.costs, limits, rng)
    assert ready.costs.within(child, limits)
    for at, choice in enumerate(ready.space.choices):
        if child != parent and child[at] + 1 < len(choice.levels):
            wider = (*child[:at], child[at] + 1, *child[at + 1 :])
            assert not ready.costs.within(wider, limits)


def test_offspring_differ_from_one_another_and_from_the_parent(ready: Ready) -> None:
    limits = limits_of(ready, 0.7)
    parent = start_of(ready, limits)
    children = offspring(parent, ready.costs, limits, 8, random.Random(1))
    assert len(children) == 8
    assert len({parent, *children}) == 9


def test_it_comes_nearer_and_never_goes_back(ready: Ready) -> None:
    limits = limits_of(ready, 0.7)
    parent = start_of(ready, limits)
    hidden = fill(ready.space.nearest(2, 48), ready.costs, limits, random.Random(9))
    judge = Distance(hidden)
    first = judge.kl([parent]).item()
    ended = evolve(
        Progress(parent, first), ready.costs, limits, [[judge], [judge]], SETTINGS, lambda _: None
    )
    kls = [first, *(step["kl"] for step in ended.history)]
    assert kls == sorted(kls, reverse=True)
    assert ended.kl < first


def test_killed_and_started_again_it_ends_alike(ready: Ready, tmp_path: Path) -> None:
    limits = limits_of(ready, 0.7)
    parent, file = start_of(ready, limits), tmp_path / "progress.json"
    stages = [[Distance(ready.space.dense)], [Distance(ready.space.dense)]]
    whole = evolve(Progress(parent, 99.0), ready.costs, limits, stages, SETTINGS, lambda _: None)

    def killed(progress: Progress) -> None:
        save_progress(progress, file)
        if len(progress.history) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(Progress(parent, 99.0), ready.costs, limits, stages, SETTINGS, killed)
    again = evolve(load_progress(file), ready.costs, limits, stages, SETTINGS, lambda _: None)
    assert again == whole


def test_it_stops_when_nothing_gets_better(ready: Ready) -> None:
    limits = limits_of(ready, 0.7)
    parent = start_of(ready, limits)
    judge = Distance(parent)
    settings = Settings(generations=50, offspring=4, survivors=(2,), patience=3, seed=0)
    ended = evolve(
        Progress(parent, 0.0), ready.costs, limits, [[judge], [judge]], settings, lambda _: None
    )
    assert ended.genome == parent
    assert len(ended.history) == 3
