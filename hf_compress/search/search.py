"""From budgets to a plan: candidates, scores, solver, evolution, and what they gain.

The plan of a search over layers is compared with the best uniform one on text that neither has
seen, and taken only where it is better by two standard errors: a checkpoint whose layers are
alike loads everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_compress.model.divergence import mean_and_error
from hf_compress.plan import Plan
from hf_compress.search.costs import Costs
from hf_compress.search.database import Database
from hf_compress.search.evaluator import Evaluator
from hf_compress.search.evolution import Progress, Settings, evolve
from hf_compress.search.scores import predicted, unscaled
from hf_compress.search.solver import solve
from hf_compress.search.space import Genome
from hf_compress.search.uniform import genome_of

STAGES = (2, 8)
"""Windows on which all children, and then the best of them, are measured."""
SURVIVORS = (3,)


@dataclass(frozen=True)
class Text:
    """Fitness windows, in two parts that do not overlap.

    Attributes:
        search: on which genomes are compared while searching.
        held_out: on which the result is compared with the best uniform plan.
    """

    search: torch.Tensor
    held_out: torch.Tensor

    @classmethod
    def split(cls, fitness_NL: torch.Tensor) -> Text:
        """Half and half."""
        half = len(fitness_NL) // 2
        return cls(fitness_NL[:half], fitness_NL[half:])


@dataclass(frozen=True)
class Found:
    """What a search over layers came to.

    Attributes:
        genome: the best.
        uniform: the best with the same widths in every layer.
        report: what was compared.
        gain: mean KL of `genome` less that of `uniform` on held-out text, and its standard error.
    """

    genome: Genome
    uniform: Genome
    report: dict[str, Any]
    gain: tuple[float, float]

    @property
    def is_better(self) -> bool:
        """Than the best uniform one, by two standard errors."""
        difference, error = self.gain
        return difference + 2 * error < 0


def search_layers(
    database: Database,
    costs: Costs,
    scores: Sequence[np.ndarray],
    limits: Mapping[str, float],
    uniform: Sequence[Plan],
    text: Text,
    settings: Settings,
    progress: Callable[[], Progress | None],
    save: Callable[[Progress], None],
) -> Found:
    """Widths for every layer.

    Args:
        scores: for each choice of the space, the KL that its levels are expected to cost.
        uniform: plans whose layers are alike.
        progress: gives what an earlier run, which was killed, had come to.
        save: keeps it.
    """
    seeds = {
        "solver": solve(costs, scores, limits),
        "solver on errors alone": solve(costs, unscaled(database), limits),
        **{f"uniform {_shown(plan)}": genome_of(costs, plan) for plan in uniform},
    }
    names = list(seeds)
    first = Evaluator(database, text.search[: STAGES[-1]], progress=True)
    kl = first.kl(list(seeds.values())).mean(1).tolist()
    measured = dict(zip(names, kl, strict=True))
    best_uniform = min((name for name in names if name.startswith("uniform")), key=measured.get)  # type: ignore[arg-type]
    best = min(names, key=measured.__getitem__)
    start = progress() or Progress(seeds[best], measured[best])
    ended = evolve(start, costs, limits, _stages(database, text.search), settings, save)
    held_out = Evaluator(database, text.held_out, progress=True)
    compared = held_out.kl([ended.genome, seeds["solver"], seeds[best_uniform]])
    report = {
        "seeds": [
            {
                "name": name,
                "kl": measured[name],
                "predicted": predicted(scores, genome),
                **_totals(costs, genome),
            }
            for name, genome in seeds.items()
        ],
        "started_from": best,
        "history": ended.history,
        "held_out": {
            name: list(mean_and_error(of))
            for name, of in zip(("evolved", "solver", "uniform"), compared, strict=True)
        },
        "held_out_window_kl": compared.tolist(),
    }
    gain = mean_and_error(compared[0] - compared[2])
    return Found(ended.genome, seeds[best_uniform], report, gain)


def _stages(database: Database, search_NL: torch.Tensor) -> list[list[Evaluator]]:
    """For each stage, evaluators on parts of the text that generations take in turns, so that
    none of them is learned by heart."""
    return [
        [Evaluator(database, part) for part in search_NL.split(count) if len(part) == count]
        or [Evaluator(database, search_NL)]
        for count in STAGES
    ]


def _totals(costs: Costs, genome: Genome) -> dict[str, Any]:
    return {"costs": {name: costs.total(name, genome) for name in costs.dense}}


def _shown(plan: Plan) -> str:
    return f"{plan.widths.num_key_value_heads}, {plan.widths.intermediate_size}"
