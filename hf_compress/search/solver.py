"""The best genome under additive scores: a multiple-choice knapsack, by scipy's MILP solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

from hf_compress.errors import RecipeError
from hf_compress.search.costs import Costs
from hf_compress.search.space import Genome

RELATIVE_GAP = 1e-3
"""Scores are no better known than that."""
SECONDS = 60.0


def solve(costs: Costs, scores: Sequence[np.ndarray], limits: Mapping[str, float]) -> Genome:
    """One level for each choice, with the least sum of scores within all limits.

    Args:
        scores: for each choice of the space, what each of its levels loses.
        limits: by name of the cost.

    Raises:
        RecipeError: the limits leave no genome; together, if each of them alone leaves some.
    """
    costs.check(limits)
    lengths = [len(of) for of in scores]
    one_each = csr_array(block_diag([np.ones((1, length)) for length in lengths]))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        # In units of the dense cost, or bytes and milliseconds would share one tolerance.
        unit = costs.dense[name]
        row = np.concatenate(costs.changes[name]) / unit
        constraints.append(LinearConstraint(row[None], -np.inf, limit / unit - 1))
    found = milp(
        np.concatenate(scores),
        constraints=constraints,
        integrality=1,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        shown = ", ".join(f"{name} {limit:,.6g}" for name, limit in limits.items())
        raise RecipeError(
            f"the budgets {shown} cannot all be met by one model ({found.message}); raise one"
        )
    starts = np.cumsum([0, *lengths])
    return tuple(int(found.x[start:stop].argmax()) for start, stop in pairwise(starts))
