"""What each level loses, in nats of KL: errors scaled by a few measurements.

The local error of a sub-layer says how its levels compare with one another, not with those of
another sub-layer; and of heads it does not even say that. So one sub-layer at a time is cut and
its KL measured: at one width for an MLP, at several for attention. Between measured levels the
scale alpha = KL / error is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_compress.search.database import Database
from hf_compress.search.evaluator import Evaluator
from hf_compress.search.space import Choice, Genome, Space

MLP_PROBES = (0.5,)
ATTENTION_PROBES = (0.33, 0.67)
"""Shares of the units that probes keep; levels nearest to them are measured."""


def probe_genomes(space: Space) -> dict[tuple[int, int], Genome]:
    """By choice and level, the dense model with one sub-layer at that level."""
    genomes = {}
    for at, choice in enumerate(space.choices):
        for level in _probed(choice):
            genome = list(space.dense)
            genome[at] = level
            genomes[at, level] = tuple(genome)
    return genomes


def score_levels(database: Database, evaluator: Evaluator) -> list[np.ndarray]:
    """For each choice, the KL that each of its levels is expected to cost."""
    space = database.space
    genomes = probe_genomes(space)
    measured = evaluator.kl(list(genomes.values())).mean(1).tolist()
    kl_of = dict(zip(genomes, measured, strict=True))
    scores = []
    for at, choice in enumerate(space.choices):
        errors = database.errors(choice).double().numpy()
        probes = {level: kl_of[at, level] for level in _probed(choice)}
        scores.append(_score(errors, probes))
    return scores


def unscaled(database: Database) -> list[np.ndarray]:
    """The errors themselves, as shares of what each sub-layer gives."""
    return [database.errors(choice).double().numpy() for choice in database.space.choices]


def _probed(choice: Choice) -> list[int]:
    """Positions of the levels that are measured, ascending; none where nothing can go."""
    below = range(len(choice.levels) - 1)
    if not below:
        return []
    shares = MLP_PROBES if choice.kind == "mlp" else ATTENTION_PROBES
    wanted = [share * choice.levels[-1] for share in shares]
    if choice.levels[0] == 0:
        wanted.append(0.0)
    return sorted({min(below, key=lambda at: abs(choice.levels[at] - units)) for units in wanted})


def _score(errors: np.ndarray, probes: dict[int, float]) -> np.ndarray:
    """Errors of ascending levels, scaled to the measured KL; never rising with the level."""
    if not probes:
        return np.zeros(len(errors))
    levels = sorted(probes)
    floor = np.finfo(float).tiny
    alphas = [max(probes[level], 0.0) / max(errors[level], floor) for level in levels]
    scores = np.interp(range(len(errors)), levels, alphas) * errors
    # From the widest down: who keeps less does not lose less.
    return np.maximum.accumulate(scores[::-1])[::-1]


def predicted(scores: Sequence[np.ndarray], genome: Genome) -> float:
    """Sum of the scores of a genome's levels."""
    return float(sum(of[level] for of, level in zip(scores, genome, strict=True)))
