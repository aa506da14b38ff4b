"""`hf-compress sweep`: every size at once, from one calibration.

The database of widths and the scores that a `search` stage computes once serve all budgets:
the solver gives widths by layer for each of them, the best widths that all layers share stand
beside, and all are measured together on fitness text that the scores have not seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hf_compress.checkpoint import staging
from hf_compress.errors import RecipeError
from hf_compress.model.divergence import mean_and_error
from hf_compress.order import check_recipe
from hf_compress.pipeline import Job
from hf_compress.plan import Plan, save_plan
from hf_compress.recipe import Calibrate, Recipe, Search
from hf_compress.report.front import Row, plot_front
from hf_compress.search.evaluator import Evaluator
from hf_compress.search.scores import predicted
from hf_compress.search.solver import solve
from hf_compress.search.space import Genome
from hf_compress.search.uniform import genome_of, uniform_plans
from hf_compress.stages.search import Searching, check_search
from hf_compress.subject import Subject
from hf_compress.workspace import Workspace

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Point:
    """One model that could be made.

    Attributes:
        share: of the dense model's cost that the budget allows.
        widths: `by layer`, or `uniform`: the same in every layer.
        predicted: KL to the dense model as the scores add up, nats per token.
        kl: the same as measured.
        kl_standard_error: over windows.
        costs: by the names of the budgets.
        plan: its file, relative to the folder of the front.
    """

    share: float
    widths: Literal["by layer", "uniform"]
    predicted: float
    kl: float
    kl_standard_error: float
    costs: dict[str, float]
    plan: str


@dataclass(frozen=True)
class Front:
    """All points.

    Attributes:
        folder: where `front.json`, `front.png` and the plans are.
        budget: names of the costs that the shares are of.
        dense: what the dense model costs.
        points: the widest first.
    """

    folder: Path
    budget: tuple[str, ...]
    dense: dict[str, float]
    points: list[Point]


def sweep(recipe: Recipe, shares: Sequence[float] = ()) -> Front:
    """Measure what the budgets of a recipe's `search` cost at several shares, and keep the
    plans of all.

    Args:
        shares: of what the dense model costs, in the place of those that the recipe says.

    Raises:
        RecipeError: the recipe has no search in the first place, a share is none, or out of reach.
    """
    check_recipe(recipe)
    settings, calibration = _search_of(recipe)
    shares = sorted(set(shares or SHARES), reverse=True)
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise RecipeError(f"--share {wrong[0]:g} is no share of the dense model's cost (0 to 1)")
    workspace = Workspace(recipe.output.with_name(recipe.output.name + ".work"))
    subject = Subject.from_recipe(recipe)
    check_search(subject.source.config, settings)
    job = Job(recipe, subject, workspace)
    searching = Searching(job.context("search", job.windows(None, None), calibration), settings)
    return _measured(searching, shares, recipe.output.with_name(recipe.output.name + ".sweep"))


def table_lines(front: Front) -> list[str]:
    """The front as a table."""
    names = list(front.budget)
    head = "".join(f"{name:>26}" for name in names)
    lines = [f"share  widths    {head}   KL predicted   KL measured"]
    for point in front.points:
        costs = "".join(f"{point.costs[name] / front.dense[name]:>25.1%} " for name in names)
        lines.append(
            f"{point.share:>5.0%}  {point.widths:<9} {costs}  {point.predicted:>12.3f}   "
            f"{point.kl:.3f} ± {point.kl_standard_error:.3f}"
        )
    return lines


def _search_of(recipe: Recipe) -> tuple[Search, Calibrate]:
    """The recipe's search, for widths by layer, and how to calibrate for it."""
    calibration = Calibrate()
    for stage in recipe.stages:
        if isinstance(stage, Search):
            raw = {**stage.model_dump(), "uniform": False}
            raw["structures"] = [name for name in stage.structures if name != "layers"]
            if not raw["structures"]:
                raise RecipeError("a sweep compares widths; add mlp_neurons to structures")
            return Search.model_validate(raw), calibration
        if not isinstance(stage, Calibrate):
            break
        calibration = stage
    raise RecipeError(
        "a sweep draws the front of a `search`, which has to be the recipe's first stage; give it "
        "one, such as {stage: search, budget: {parameters: 0.7}}"
    )


def _measured(searching: Searching, shares: Sequence[float], folder: Path) -> Front:
    config = searching.source.config
    scored, costs = searching.scored(searching.statistics()), searching.costs()
    names = tuple(searching.settings.budget.given)
    wanted: list[tuple[float, Literal["by layer", "uniform"], Genome]] = []
    for share in shares:
        limits = {name: share * costs.dense[name] for name in names}
        wanted.append((share, "by layer", solve(costs, scored.scores, limits)))
        plans = uniform_plans(config, costs, limits, layers=False)
        wanted += [(share, "uniform", genome_of(costs, plan)) for plan in plans]
    evaluator = Evaluator(scored.database, searching.text.held_out, progress=True)
    kl_GN = evaluator.kl([genome for *_, genome in wanted])
    scored.database.forget_weights()
    kept: dict[str, tuple[Point, Plan]] = {}
    for (share, widths, genome), kl_N in zip(wanted, kl_GN, strict=True):
        kl, error = mean_and_error(kl_N)
        name = f"plans/{share:.2f}-{widths.replace(' ', '-')}.json"
        plan = scored.database.space.plan(genome, config)
        total = {cost: costs.total(cost, genome) for cost in costs.dense}
        point = Point(share, widths, predicted(scored.scores, genome), kl, error, total, name)
        # Of the splits that all layers may share, the best.
        if name not in kept or kl < kept[name][0].kl:
            kept[name] = (point, plan)
    points = [point for point, _ in kept.values()]
    front = Front(folder, names, dict(costs.dense), points)
    _write(front, {name: plan for name, (_, plan) in kept.items()})
    return front


def _write(front: Front, plans: dict[str, Plan]) -> None:
    with staging(front.folder) as folder:
        (folder / "plans").mkdir()
        for name, plan in plans.items():
            save_plan(plan, folder / name)
        data: dict[str, Any] = {
            "budget": list(front.budget),
            "dense": front.dense,
            "points": [asdict(point) for point in front.points],
        }
        (folder / "front.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        name = front.budget[0]
        series: dict[str, list[Row]] = {"by layer": [], "uniform": []}
        for point in front.points:
            share = point.costs[name] / front.dense[name]
            row = (share, point.predicted, point.kl, point.kl_standard_error)
            series[point.widths].append(row)
        plot_front(series, name.replace("_", " "), folder / "front.png")
