"""`stage: prune`: calibrate where something depends on it, choose the split, cut, verify."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_compress.calibration import (
    collect,
    collect_beside,
    collect_expert_neurons,
    collect_experts,
    warn_if_experts_get_few,
    warn_if_few_tokens,
)
from hf_compress.heterogeneous.config import check_plan
from hf_compress.model.blocks import meta_model
from hf_compress.model.parameters import count_parameters
from hf_compress.model.surgery import Dimensions, widest_output
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan, load_plan, save_plan
from hf_compress.pruning import (
    BlockReport,
    Candidate,
    Drop,
    Streams,
    Templates,
    candidate_plans,
    check_settings,
    compare_splits,
    kept_sublayers,
    most_passes,
    narrows,
    num_lacking,
    planned_config,
    protected_layers,
    prune_blocks,
    settle_layers,
    settle_sublayers,
)
from hf_compress.recipe import SUBLAYERS, Prune
from hf_compress.stages.context import Context, read_note, write_note, write_report
from hf_compress.stages.output import Output
from hf_compress.stages.residual import run_residual
from hf_compress.stages.statistics import calibration_step, collect_statistics
from hf_compress.statistics import Statistics
from hf_compress.workspace import PLAN, REPORT


def check_prune(config: PretrainedConfig, settings: Prune) -> None:
    """Raise RecipeError for an unknown criterion or a sparsity out of reach."""
    check_settings(settings)
    if settings.plan:
        check_plan(config, load_plan(settings.plan))
    elif settings.sparsity is not None:
        candidate_plans(config, settings)


def describe_prune(
    config: PretrainedConfig, settings: Prune, dtype: torch.dtype
) -> tuple[list[str], PretrainedConfig]:
    """What the stage will do, and the configuration after its first candidate."""
    check_settings(settings)
    before = count_parameters(meta_model(config, dtype))
    if settings.plan:
        return _describe_plan(config, settings, dtype)
    if settings.sparsity is None:
        return ["prune      to the widths that the search finds"], config
    criterion = settings.channel_criterion if narrows(settings) else settings.criterion
    lines = [
        f"prune      {settings.sparsity:.1%} of the non-embedding parameters by "
        f"{criterion}, {'folded' if settings.fold else 'not folded'}; candidates:"
    ]
    candidates = []
    plans = candidate_plans(config, settings)
    for plan in plans:
        pruned = planned_config(config, plan)
        candidates.append(pruned)
        after = count_parameters(meta_model(pruned, dtype))
        lines.append(
            f"           {_kept(plan, config, settings)}: {after.total:,} parameters, "
            f"{after.total * dtype.itemsize / 1e6:,.1f} MB, "
            f"{1 - after.non_embedding / before.non_embedding:.1%} removed"
        )
    if len(plans) > 1:
        lines.append("           the one with the least KL to the dense model is chosen")
    count = config.num_hidden_layers
    dropped = {"layers": max(_layers_to_choose(plan, count) for plan in plans)}
    for part in ("attention", "mlp"):
        dropped[f"{part} sub-layers"] = max(
            num_lacking(plan, part, count) - _layers_to_choose(plan, count) for plan in plans
        )
    lines += [
        f"           to choose {most} of {count} {what} costs at most {most_passes(most)} passes "
        "over the fitness text"
        for what, most in dropped.items()
        if most
    ]
    return lines, candidates[0]


def _describe_plan(
    config: PretrainedConfig, settings: Prune, dtype: torch.dtype
) -> tuple[list[str], PretrainedConfig]:
    assert settings.plan is not None
    plan = load_plan(settings.plan)
    check_plan(config, plan)
    pruned = planned_config(config, plan)
    after = count_parameters(meta_model(pruned, dtype))
    before = count_parameters(meta_model(config, dtype))
    return [
        f"prune      to {settings.plan}: {after.total:,} parameters, "
        f"{after.total * dtype.itemsize / 1e6:,.1f} MB, "
        f"{1 - after.non_embedding / before.non_embedding:.1%} removed",
    ], pruned


def _layers_to_choose(plan: Plan, count: int) -> int:
    """Layers that go as such, and not because both their sub-layers do."""
    return count - len(plan.layers) if plan.kept_layers is None else 0


def _kept(plan: Plan, config: PretrainedConfig, settings: Prune) -> str:
    widths, count = plan.widths, config.num_hidden_layers
    mlp = f"{widths.intermediate_size} neurons"
    if widths.num_experts is not None:
        mlp = f"{widths.num_experts} experts of {mlp}"
    parts = [f"{widths.num_key_value_heads} KV groups", mlp]
    if "query_heads" in settings.structures:
        parts.insert(1, f"{widths.heads_per_group or 'all'} query heads in each")
    if {"layers", *SUBLAYERS} & set(settings.structures):
        layers = f"{len(plan.layers)} layers"
        for name, part in SUBLAYERS.items():
            if name in settings.structures:
                layers += f", {count - num_lacking(plan, part, count)} with {part}"
        parts.insert(0, layers)
    if plan.hidden_size is not None:
        parts = [f"{plan.hidden_size} channels of the residual stream"]
    return ", ".join(parts)


def run_prune(context: Context, settings: Prune) -> Path:
    """The pruned checkpoint, verified in a fresh process."""
    check_settings(settings)
    if settings.plan:
        return prune_to(context, settings, load_plan(settings.plan))
    if context.proposal:
        return prune_to(context, settings, load_plan(context.proposal / PLAN))
    if narrows(settings):
        return run_residual(context, settings)
    stage = _Pruning(context, settings, candidate_plans(context.source.config, settings))
    return _run(stage, {"settings": settings.model_dump(mode="json")})


def prune_to(context: Context, settings: Prune, plan: Plan) -> Path:
    """The same for a plan that was made elsewhere, whose layers may differ.

    Raises:
        PlanError: it does not fit the model.
    """
    check_settings(settings)
    check_plan(context.source.config, plan)
    inputs = {
        "settings": settings.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
    }
    return _run(_Pruning(context, settings, [plan], is_settled=True), inputs)


def _run(stage: _Pruning, inputs: dict[str, Any]) -> Path:
    statistics = stage.calibrate() if stage.needs_statistics else None
    context = stage.context
    key = context.workspace.key(calibration_step(context)) if statistics else None
    return context.step(
        context.name,
        {**inputs, "statistics": key},
        lambda folder: stage.build(folder, statistics),
    )


class _Pruning:
    """One `prune` stage, in its parts."""

    def __init__(
        self, context: Context, settings: Prune, plans: list[Plan], *, is_settled: bool = False
    ) -> None:
        self.context = context
        self.settings = settings
        self.plans = plans
        self.is_settled = is_settled
        """Whether the plans say which layers and sub-layers go, and not only how many."""

    @property
    def needs_statistics(self) -> bool:
        """Whether anything is decided by statistics of the model as it was found."""
        return not self.settings.recollect or len(self.plans) > 1

    def calibrate(self) -> Statistics:
        """Gram matrices of the model as it was found.

        Where pruning recollects them, they only serve to compare splits, and a share of the
        text tells as much about that.
        """
        context = self.context
        some = self.settings.recollect
        return collect_statistics(
            context, context.some_text() if some else context.windows["calibration"]
        )

    def build(self, folder: Path, statistics: Statistics | None) -> None:
        """Write the checkpoint, its plan and its report into `folder`."""
        start = time.perf_counter()
        before = read_note(statistics.folder) if statistics else {}
        if self.context.proposal:
            before |= read_note(self.context.proposal)
        seconds: dict[str, float] = {}
        context, settings = self.context, self.settings
        ids_NL = context.windows["calibration"]
        if settings.criterion != "magnitude" or settings.fold:
            num, length = ids_NL.shape
            warn_if_few_tokens(num, length, widest_output(context.source.config))
            if "expert_neurons" in settings.structures:
                warn_if_experts_get_few(num, length, context.source.config)
        fitness_NL = context.windows["fitness"]
        plans, drops = self._settle(fitness_NL)
        if drops:
            seconds["choose layers"] = time.perf_counter() - start
        plan, candidates = plans[0], []
        if statistics and len(plans) > 1:
            beside = None
            if "expert_neurons" in settings.structures:
                beside = self._streams(context.some_text(), corrects=False)
            candidates = compare_splits(
                context.source, statistics, plans, fitness_NL, settings, beside
            )
            plan = min(candidates, key=lambda candidate: candidate.kl).plan
            seconds["compare splits"] = time.perf_counter() - start - sum(seconds.values())
        templates = Templates(context.source, plan)
        output = Output(folder, context, templates.model)
        reports = self._cut(plan, templates, statistics, output)
        seconds["prune"] = time.perf_counter() - start - sum(seconds.values())
        result = output.verify()
        seconds["verify"] = time.perf_counter() - start - sum(seconds.values())
        write_note(folder, {**before, **seconds})
        dims = Dimensions.of(context.source.config)
        report = {
            "stage": "prune",
            "settings": settings.model_dump(mode="json"),
            "plan": plan.model_dump(mode="json"),
            "candidates": [_candidate(candidate, plan, dims) for candidate in candidates],
            "dropped_layers": _dropped(drops, plan, whole=True),
            "dropped_sublayers": _dropped(drops, plan, whole=False),
            "layers": [asdict(report) for report in reports],
            "verification": asdict(result),
            "search": self._searched(),
            "num_calibration_tokens": ids_NL.numel(),
        }
        write_report(folder, report)

    def _settle(self, fitness_NL: torch.Tensor) -> tuple[list[Plan], list[Drop]]:
        """The plans with which layers and sub-layers go, and how these were chosen."""
        if self.is_settled:
            return self.plans, []
        source, settings = self.context.source, self.settings
        protected = kept_sublayers(source.config, settings)
        plans, sublayers = settle_sublayers(source, self.plans, fitness_NL, protected)
        layers = protected_layers(source.config, settings)
        plans, drops = settle_layers(source, plans, fitness_NL, layers)
        return plans, [*drops, *sublayers]

    def _searched(self) -> dict[str, Any] | None:
        """What the search before this stage said of its plan."""
        if self.context.proposal is None:
            return None
        return json.loads((self.context.proposal / REPORT).read_text("utf-8"))

    def _cut(
        self, plan: Plan, templates: Templates, statistics: Statistics | None, output: Output
    ) -> list[BlockReport]:
        reports = prune_blocks(
            self.context.source,
            statistics,
            plan,
            templates,
            self.settings,
            streams=self._streams(
                self.context.windows["calibration"], corrects=self.settings.corrects
            )
            if self.settings.recollect
            else None,
            probe=output.probe,
            write=output.write,
        )
        output.close()
        save_plan(plan, output.folder / PLAN)
        return reports

    def _streams(self, ids_NL: torch.Tensor, *, corrects: bool) -> Streams:
        source = self.context.source
        batch_size = self.context.calibration.batch_size
        weighting = self.context.calibration.token_weighting
        pruned = Walk(source, ids_NL, batch_size)
        dense, gather = None, partial(collect, pruned, weighting=weighting)
        if corrects and source.family.adds_outputs(source.config):
            dense = Walk(source, ids_NL, batch_size)
            gather = partial(collect_beside, pruned, dense, weighting=weighting)
        return Streams(
            pruned,
            dense,
            gather,
            partial(collect_experts, pruned, weighting=weighting),
            partial(collect_expert_neurons, pruned, weighting=weighting),
        )


def _dropped(drops: list[Drop], plan: Plan, *, whole: bool) -> list[dict[str, Any]]:
    """What was to go in some plan, and whether it goes in the chosen one."""
    return [
        {**asdict(drop), "dropped": drop.layer not in _having(plan, drop.part)}
        for drop in drops
        if (drop.part == "layer") == whole
    ]


def _having(plan: Plan, part: str) -> set[int]:
    """Layers that keep a part, or themselves, by their index in the dense model."""
    places = plan.positions.items()
    return {index for index, position in places if part not in plan.layers[position].skip}


def _candidate(candidate: Candidate, chosen: Plan, dims: Dimensions) -> dict[str, Any]:
    plan, widths = candidate.plan, candidate.plan.widths
    return {
        "num_hidden_layers": len(plan.layers),
        "attention_sublayers": len(_having(plan, "attention")),
        "mlp_sublayers": len(_having(plan, "mlp")),
        "num_key_value_heads": widths.num_key_value_heads,
        "heads_per_group": widths.heads_per_group or dims.heads_per_group,
        "intermediate_size": widths.intermediate_size,
        "num_experts": widths.num_experts,
        "kl": candidate.kl,
        "kl_standard_error": candidate.kl_standard_error,
        "chosen": plan == chosen,
    }
