"""`stage: search`: which widths lose the least under the budgets; the next stage cuts to them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.heterogeneous.auto import STEMS
from hf_compress.model.blocks import meta_model
from hf_compress.model.families import family_of
from hf_compress.plan import Plan, save_plan
from hf_compress.pruning import compare_splits, settle_layers
from hf_compress.pruning.ignore import find_ignored
from hf_compress.recipe import Prune, Search
from hf_compress.search.costs import LATENCIES, Costs, count_costs, with_latencies
from hf_compress.search.database import Database, build_database
from hf_compress.search.evaluator import Evaluator
from hf_compress.search.evolution import Settings, load_progress, save_progress
from hf_compress.search.latency import Setting, measure_latencies
from hf_compress.search.scores import score_levels
from hf_compress.search.search import SURVIVORS, Text, search_layers
from hf_compress.search.space import MAX_LEVELS, MAX_UNIFORM_LEVELS, Kind, Space
from hf_compress.search.uniform import uniform_plans
from hf_compress.stages.context import Context, read_note, write_note, write_report
from hf_compress.stages.statistics import calibration_step, collect_statistics
from hf_compress.statistics import Statistics
from hf_compress.workspace import PLAN, digest

PROBE_WINDOWS = 4
CUTTING = Prune(sparsity=0.5)
"""How candidates are cut while they are compared; nothing in it depends on the sparsity."""


def check_search(config: PretrainedConfig, settings: Search) -> None:
    """Raise RecipeError for what this model cannot do, or for a budget out of reach."""
    family, kind = family_of(config), config.model_type
    if family.experts is not None:
        raise RecipeError(
            f"search cannot yet choose the widths of a mixture of experts ({kind}); say a sparsity "
            "in `prune` and leave `search` out"
        )
    if not settings.uniform and kind not in STEMS:
        raise RecipeError(
            f"uniform: false needs a checkpoint whose layers differ, for which hf_compress has "
            f"modelling files for {', '.join(sorted(STEMS))}, and not for {kind}; set uniform: true"
        )
    if not family.cuts_heads and "kv_groups" in settings.structures:
        raise RecipeError(
            f"structures names kv_groups, and the heads of {kind} cannot be cut; set structures to "
            "[mlp_neurons]"
        )
    costs = _counted(config, settings, torch.float32)
    limits = settings.budget.limits(costs.dense)
    if settings.uniform:
        uniform_plans(config, costs, limits, layers="layers" in settings.structures)
    else:
        costs.check(limits)


def describe_search(
    config: PretrainedConfig, settings: Search, dtype: torch.dtype
) -> tuple[list[str], PretrainedConfig]:
    """What the stage will look for; widths are known when it has run."""
    check_search(config, settings)
    costs = _counted(config, settings, dtype)
    lines = ["search     widths, " + ("all layers alike" if settings.uniform else "layer by layer")]
    for name, amount in settings.budget.given.items():
        if name in LATENCIES:
            lines.append(f"           {name} at most {amount} of what is measured on this machine")
            continue
        limit = settings.budget.limits(costs.dense)[name]
        lines.append(
            f"           {name} at most {limit:,.0f}, {limit / costs.dense[name]:.1%} of the dense "
            f"model's {costs.dense[name]:,.0f}"
        )
    return lines, config


def passes_of_search(settings: Search, tokens: int) -> float:
    """About how many forward passes over the calibration text it costs."""
    if settings.uniform:
        return 1.0
    return 6 + 0.4 * settings.generations * settings.offspring / 16


def run_search(context: Context, settings: Search) -> Path:
    """A folder with the plan and with what was compared."""
    check_search(context.source.config, settings)
    stage = Searching(context, settings)
    statistics = stage.statistics()
    inputs = {
        "settings": settings.model_dump(mode="json"),
        "statistics": context.workspace.key(calibration_step(context)),
    }
    if settings.uniform:
        return context.step(
            context.name, inputs, lambda folder: stage.build_uniform(folder, statistics)
        )
    scored = stage.scored(statistics)
    inputs["scores"] = context.workspace.key(stage.name("scores"))
    return context.step(context.name, inputs, lambda folder: stage.build(folder, scored, inputs))


@dataclass(frozen=True)
class Scored:
    """The widths of every sub-layer and what each is expected to lose."""

    database: Database
    scores: list[np.ndarray]


class Searching:
    """One `search` stage, in its steps."""

    def __init__(self, context: Context, settings: Search) -> None:
        self.context, self.settings = context, settings
        self.source = context.source
        self.text = Text.split(context.windows["fitness"])

    def name(self, part: str) -> str:
        """Of a step that this stage needs."""
        return f"{self.context.name}-{part}"

    def statistics(self) -> Statistics:
        """Gram matrices of the dense model, on a part of the text where only splits are
        compared."""
        context = self.context
        some = self.settings.uniform
        return collect_statistics(
            context, context.some_text() if some else context.windows["calibration"]
        )

    def costs(self) -> Costs:
        """Of every level, timed where a budget asks for it."""
        settings = self.settings
        costs = _counted(self.source.config, settings, self.source.dtype)
        if not any(name in LATENCIES for name in settings.budget.given):
            return costs
        setting = Setting(settings.batch_size, settings.context)
        found = measure_latencies(
            self.source.config, costs.space, self.source.dtype, self.source.device, setting
        )
        return with_latencies(costs, found)

    def build_uniform(self, folder: Path, statistics: Statistics) -> None:
        """The best of the splits that all layers share."""
        start = time.perf_counter()
        config, settings, context = self.source.config, self.settings, self.context
        costs = self.costs()
        limits = settings.budget.limits(costs.dense)
        layers = "layers" in settings.structures
        plans = uniform_plans(config, costs, limits, layers=layers)
        fitness_NL = context.windows["fitness"]
        protected = _ignored(config, settings).layers
        plans, drops = settle_layers(self.source, plans, fitness_NL, protected)
        candidates = compare_splits(self.source, statistics, plans, fitness_NL, CUTTING)
        best = min(candidates, key=lambda candidate: candidate.kl)
        report = {
            "candidates": [
                {
                    "plan": one.plan.model_dump(mode="json"),
                    "kl": one.kl,
                    "kl_standard_error": one.kl_standard_error,
                    "chosen": one is best,
                }
                for one in candidates
            ],
            "dropped_layers": [drop.layer for drop in drops],
        }
        write_note(folder, self._seconds([], time.perf_counter() - start))
        self._finish(folder, best.plan, costs, limits, report)

    def scored(self, statistics: Statistics) -> Scored:
        """The error database, and scores from probes."""
        space = _space(self.source.config, self.settings)
        step, inputs = self.context.step, {"space": repr(space)}
        inputs["statistics"] = self.context.workspace.key(calibration_step(self.context))

        def errors(folder: Path) -> None:
            start = time.perf_counter()
            build_database(self.source, statistics, space, CUTTING, folder)
            write_note(folder, {"error database": time.perf_counter() - start})

        folder = step(self.name("errors"), inputs, errors)
        weights = self.context.workspace.folder / f".{self.name('weights')}-{digest(inputs)[:12]}"
        database = Database(self.source, statistics, space, CUTTING, folder, weights)

        def probes(folder: Path) -> None:
            start = time.perf_counter()
            ids_NL = self.text.search[:PROBE_WINDOWS]
            evaluator = Evaluator(database, ids_NL, progress=True)
            scores = [of.tolist() for of in score_levels(database, evaluator)]
            (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
            write_note(folder, {"probes": time.perf_counter() - start})

        inputs["errors"] = self.context.workspace.key(self.name("errors"))
        folder = step(self.name("scores"), inputs, probes)
        stored = json.loads((folder / "scores.json").read_text("utf-8"))
        return Scored(database, [np.array(of) for of in stored])

    def build(self, folder: Path, scored: Scored, inputs: dict[str, Any]) -> None:
        """Widths for every layer, or the best uniform ones where that is no worse."""
        start = time.perf_counter()
        settings, config = self.settings, self.source.config
        costs = self.costs()
        limits = settings.budget.limits(costs.dense)
        kept = self.context.workspace.folder / f".{self.name('progress')}-{digest(inputs)[:12]}"
        found = search_layers(
            scored.database,
            costs,
            scored.scores,
            limits,
            uniform_plans(config, costs, limits, layers=False),
            self.text,
            Settings(
                settings.generations,
                settings.offspring,
                SURVIVORS,
                settings.patience,
                self.context.seed,
            ),
            lambda: load_progress(kept) if kept.is_file() else None,
            lambda progress: save_progress(progress, kept),
        )
        genome = found.genome if found.is_better else found.uniform
        report = {**found.report, "gain": found.gain, "is_better_than_uniform": found.is_better}
        plan = scored.database.space.plan(genome, config)
        steps = [self.name("errors"), self.name("scores")]
        write_note(folder, self._seconds(steps, time.perf_counter() - start))
        self._finish(folder, plan, costs, limits, report)
        kept.unlink(missing_ok=True)
        scored.database.forget_weights()

    def _seconds(self, steps: list[str], spent: float) -> dict[str, float]:
        """Of calibrating, of the other steps that this one was made from, and of itself."""
        seconds: dict[str, float] = {}
        for step in (calibration_step(self.context), *steps):
            seconds |= read_note(self.context.workspace.folder / step)
        return {**seconds, "search": spent}

    def _finish(
        self,
        folder: Path,
        plan: Plan,
        costs: Costs,
        limits: dict[str, float],
        report: dict[str, Any],
    ) -> None:
        save_plan(plan, folder / PLAN)
        write_report(
            folder,
            {
                "stage": "search",
                "settings": self.settings.model_dump(mode="json"),
                "limits": limits,
                "dense": dict(costs.dense),
                "plan": plan.model_dump(mode="json"),
                **report,
            },
        )


def _counted(config: PretrainedConfig, settings: Search, dtype: torch.dtype) -> Costs:
    return count_costs(config, _space(config, settings), dtype, settings.context)


def _ignored(config: PretrainedConfig, settings: Search) -> Any:
    return find_ignored(meta_model(config, torch.float32), settings.ignore)


def _space(config: PretrainedConfig, settings: Search) -> Space:
    frozen: set[tuple[int, Kind]] = set()
    if settings.ignore:
        widths = _ignored(config, settings).widths
        for kind in ("attention", "mlp"):
            layers = widths[kind]
            if layers and settings.uniform:
                layers = frozenset(range(config.num_hidden_layers))
            frozen |= {(layer, kind) for layer in layers}
    most = MAX_UNIFORM_LEVELS if settings.uniform else MAX_LEVELS
    return Space.of(config, settings.structures, settings.round_to, frozenset(frozen), most)
