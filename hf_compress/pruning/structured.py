"""Structured pruning of a whole model: choose the split, then cut block after block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import BlockSource, attention_half, mlp_half
from hf_compress.model.divergence import compare, next_tokens
from hf_compress.model.surgery import Dimensions, cut_block
from hf_compress.model.walk import Walk, finite_state
from hf_compress.plan import LayerPlan, Plan
from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.cutter import (
    Cutter,
    loses_experts,
    loses_heads,
    loses_neurons,
    num_experts_of,
)
from hf_compress.pruning.expert_neurons import Mixture
from hf_compress.pruning.experts import EXPERT_CRITERIA, ExpertLayer, ShrunkExperts
from hf_compress.pruning.layer import PROBE_DAMPING, OutputLayer, Shrunk, cut_of
from hf_compress.pruning.reports import BlockReport
from hf_compress.pruning.streams import Reorder, Streams
from hf_compress.pruning.templates import Templates
from hf_compress.recipe import Prune
from hf_compress.statistics import ExpertMoments, Moments, Statistics


@dataclass(frozen=True)
class Candidate:
    """One split between KV groups and neurons, measured on the fitness windows."""

    plan: Plan
    kl: float
    kl_standard_error: float


def check_settings(settings: Prune) -> None:
    """Raise RecipeError for a criterion that is not in its table."""
    for field in ("criterion", "channel_criterion"):
        if getattr(settings, field) not in CRITERIA:
            raise RecipeError(
                f"unknown {field} {getattr(settings, field)!r}; the valid ones are "
                f"{', '.join(CRITERIA)}"
            )
    if settings.expert_criterion not in EXPERT_CRITERIA:
        raise RecipeError(
            f"unknown expert_criterion {settings.expert_criterion!r}; the valid ones are "
            f"{', '.join(EXPERT_CRITERIA)}"
        )


def compare_splits(
    source: BlockSource,
    statistics: Statistics,
    plans: list[Plan],
    fitness_NL: torch.Tensor,
    settings: Prune,
    streams: Streams | None = None,
) -> list[Candidate]:
    """KL to the dense model of every plan, on the fitness windows.

    All plans are cut from one removal order a block and walk side by side with the dense
    model, so that a block is loaded once.

    Args:
        streams: text on its way through the dense model, needed where neurons of experts go:
            their Gram matrices are too many to be kept on disk.
    """
    dims = Dimensions.of(source.config)
    templates = [Templates(source, plan) for plan in plans]
    dense = Walk(source, fitness_NL)
    walks = [Walk(source, fitness_NL) for _ in plans]
    fewest = min(layer.intermediate_size for plan in plans for layer in plan.layers)
    for index in tqdm(range(source.config.num_hidden_layers), desc="compare splits", unit="block"):
        with source.block(index) as block:
            seen = statistics.block(index)
            groups = neurons = None
            experts: dict[_OfExperts, ShrunkExperts] = {}
            if seen.attention:
                groups = OutputLayer.attention(
                    block, source.family, dims, Moments(seen.attention), settings
                )
            if seen.experts:
                comparison = _Comparison(source, plans, templates, settings, streams)
                experts = comparison.experts(block, index, seen.experts)
            elif seen.mlp and not source.family.experts:
                neurons = OutputLayer.mlp(block, source.family, Moments(seen.mlp), settings, fewest)
            for plan, template, walk in zip(plans, templates, walks, strict=True):
                position = plan.positions.get(index)
                if position is None:
                    continue
                widths = plan.layers[position]
                kept_groups = widths.num_key_value_heads
                cut = cut_of(
                    groups.shrink(kept_groups, PROBE_DAMPING, parts=widths.heads_per_group)
                    if groups and "attention" not in widths.skip
                    else Shrunk(torch.arange(kept_groups)),  # heads that cannot be cut, or go whole
                    neurons.shrink(widths.intermediate_size, PROBE_DAMPING)
                    if neurons and "mlp" not in widths.skip
                    else None,
                    experts[_of_experts(widths, source)] if experts else None,
                    skip=widths.skip,
                )
                pruned = cut_block(block, template.block(position), source.family, dims, cut)
                walk.advance(pruned, index)
            dense.advance(block, index)
            if streams:
                streams.pruned.advance(mlp_half(block, source.family), index)
    compared = compare(dense, walks, next_tokens(fitness_NL).targets_NP)
    return [Candidate(plan, *found.kl) for plan, found in zip(plans, compared, strict=True)]


_OfExperts = tuple[int, int]
"""How many experts a layer has, of how many neurons each."""


def _of_experts(widths: LayerPlan, source: BlockSource) -> _OfExperts:
    return num_experts_of(widths, source.config), widths.intermediate_size


@dataclass(frozen=True)
class _Comparison:
    """What the plans that are compared make of the experts of one block after another."""

    source: BlockSource
    plans: list[Plan]
    templates: list[Templates]
    settings: Prune
    streams: Streams | None

    def experts(
        self, block: nn.Module, index: int, moments: ExpertMoments
    ) -> dict[_OfExperts, ShrunkExperts]:
        """By how many experts there are to be, of how many neurons; the streams, if any, end
        after the attention half of the block."""
        source = self.source
        assert source.family.experts is not None
        if self.streams:
            self.streams.pruned.advance(attention_half(block, source.family), index)
        layer = ExpertLayer.of(block, source.family.experts, moments, self.settings)
        found: dict[_OfExperts, ShrunkExperts] = {}
        for plan, templates in zip(self.plans, self.templates, strict=True):
            position = plan.positions.get(index)
            if position is None:
                continue
            count, width = _of_experts(plan.layers[position], source)
            if (count, width) in found:
                continue
            widths = {each.intermediate_size for each in self._plans_with(count, index)}
            shrunk = {width: layer.shrink(count)}
            if self.streams:
                mixture = Mixture(block, index, position, source, self.settings, templates)
                collect = self.streams.collect_neurons
                shrunk = mixture.shrink(shrunk[width], widths, collect, PROBE_DAMPING)
            found |= {(count, width): experts for width, experts in shrunk.items()}
        return found

    def _plans_with(self, count: int, index: int) -> list[LayerPlan]:
        """Widths of layer `index` in the plans that keep so many experts there."""
        layers = [
            plan.layers[plan.positions[index]] for plan in self.plans if index in plan.positions
        ]
        return [each for each in layers if num_experts_of(each, self.source.config) == count]


def prune_blocks(
    source: BlockSource,
    statistics: Statistics | None,
    plan: Plan,
    templates: Templates,
    settings: Prune,
    *,
    streams: Streams | None,
    probe: Walk,
    write: Callable[[str, torch.Tensor], None],
    reorder: Reorder | None = None,
) -> list[BlockReport]:
    """Cut every block that stays to the plan and hand its tensors to `write`, renumbered.

    Args:
        streams: the calibration windows; each block is then chosen and folded on the
            inputs that it will really get. Without them the dense statistics serve.
        probe: a walk that follows the pruned model, for the check after saving.
        write: takes a tensor's name in the checkpoint, and the tensor.
        reorder: sees every output layer before it shrinks, and may give it another order.
    """
    dims = Dimensions.of(source.config)
    narrower = any(
        loses_heads(widths, dims)
        or loses_neurons(widths, dims)
        or loses_experts(widths, source.config)
        for widths in set(plan.layers)
    )
    if not narrower:
        streams = None  # nobody asks what flows through blocks that stay as they are
    reports = []
    for index in tqdm(range(source.config.num_hidden_layers), desc="prune", unit="block"):
        if index not in plan.positions:
            _leave_out(source, index, streams)
            continue
        position = plan.positions[index]
        name = f"{source.family.layers}.{position}"
        with source.block(index) as block:
            widths = plan.layers[position]
            cutter = Cutter(
                block, index, position, source, dims, settings, widths, templates, reorder
            )
            if not narrower:
                pruned, report = cutter.whole()
            elif streams:
                pruned, report = cutter.on_pruned_stream(streams)
            elif statistics:
                pruned, report = cutter.on_dense_stream(statistics)
            else:
                raise ValueError("neither streams nor statistics to prune by")
        for key, value in finite_state(pruned, name, "pruned"):
            write(key, value)
        probe.advance(pruned, index)
        reports.append(report)
    return reports


def _leave_out(source: BlockSource, index: int, streams: Streams | None) -> None:
    """Only the dense stream goes through a block that is dropped."""
    if streams and streams.dense:
        with source.block(index) as block:
            streams.dense.advance(block, index)
