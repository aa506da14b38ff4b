"""Structured pruning of a whole model: choose the split, then cut block after block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.heterogeneous.config import heterogeneous_config
from hf_compress.model.blocks import BlockSource, meta_model, mlp_half, parts
from hf_compress.model.divergence import compare, next_tokens
from hf_compress.model.experts import ExpertCut
from hf_compress.model.families import family_of, has_experts, native_config
from hf_compress.model.surgery import Dimensions, cut_block
from hf_compress.model.walk import Walk, finite_state
from hf_compress.plan import LayerPlan, Plan
from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.experts import EXPERT_CRITERIA, ExpertLayer, ShrunkExperts
from hf_compress.pruning.layer import (
    PROBE_DAMPING,
    BlockReport,
    OutputLayer,
    Shrunk,
    cut_of,
)
from hf_compress.recipe import Prune
from hf_compress.statistics import ExpertMoments, Moments, Statistics


class Collect(Protocol):
    """Moments of half a block of the dense model on the pruned stream; a walk that follows
    the dense model goes through it. Takes the inputs of its output layer, if `keep` is given."""

    def __call__(
        self, half: nn.Module, index: int, output: str, *, keep: list[torch.Tensor] | None = None
    ) -> Moments: ...


class CollectExperts(Protocol):
    """What the experts in the MLP half of a block do on the pruned stream; no walk moves."""

    def __call__(self, half: nn.Module, index: int) -> ExpertMoments: ...


Reorder = Callable[[int, str, OutputLayer], OutputLayer]
"""`(block, output layer, as the criterion orders it) -> with the order that it is cut by`."""


@dataclass(frozen=True)
class Streams:
    """The calibration windows on their way through the pruned model.

    Attributes:
        pruned: a walk that follows the pruned model.
        dense: one that follows the dense model beside it, or None without correction.
        collect: gathers moments on them.
        collect_experts: gathers what experts do on them.
    """

    pruned: Walk
    dense: Walk | None
    collect: Collect
    collect_experts: CollectExperts

    @property
    def walks(self) -> list[Walk]:
        return [self.pruned, self.dense] if self.dense else [self.pruned]


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


def planned_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """The configuration of what a plan leaves of a model: of the model's own kind where all
    layers are alike and whole, else of one whose modelling file goes with the weights.

    Raises:
        RecipeError: no native class can express the widths that all layers have.
        PlanError: layers differ, and the plan does not fit or the family has no such file.
    """
    if not plan.is_uniform:
        return heterogeneous_config(config, plan)
    widths: LayerPlan = plan.widths
    planned = native_config(
        config,
        widths.intermediate_size,
        widths.num_key_value_heads,
        widths.heads_per_group,
        list(plan.positions),
        widths.num_experts,
        plan.hidden_size,
    )
    if planned is None:
        raise RecipeError(
            f"{config.model_type} cannot express {widths.num_key_value_heads} KV groups of "
            f"{widths.heads_per_group or 'all'} query heads natively; keep a number of heads that "
            "divides hidden_size"
        )
    return planned


class Templates:
    """Blocks without weights at the widths of a plan, one for each that it keeps."""

    def __init__(self, source: BlockSource, plan: Plan) -> None:
        config = planned_config(source.config, plan)
        config._attn_implementation = source.config._attn_implementation
        config._experts_implementation = source.config._experts_implementation
        self.config = config
        self.model = meta_model(config, source.dtype)
        # The model has a copy of the configuration, and is what gets saved.
        for each in (config, self.model.config):
            each.architectures = [type(self.model).__name__]
        self._layers = source.family.layers

    def block(self, position: int) -> nn.Module:
        return self.model.get_submodule(f"{self._layers}.{position}")


def compare_splits(
    source: BlockSource,
    statistics: Statistics,
    plans: list[Plan],
    fitness_NL: torch.Tensor,
    settings: Prune,
) -> list[Candidate]:
    """KL to the dense model of every plan, on the fitness windows.

    All plans are cut from one removal order a block and walk side by side with the dense
    model, so that a block is loaded once.
    """
    dims = Dimensions.of(source.config)
    templates = [Templates(source, plan) for plan in plans]
    dense = Walk(source, fitness_NL)
    walks = [Walk(source, fitness_NL) for _ in plans]
    fewest = min(layer.intermediate_size for plan in plans for layer in plan.layers)
    for index in tqdm(range(source.config.num_hidden_layers), desc="compare splits", unit="block"):
        with source.block(index) as block:
            seen = statistics.block(index)
            groups = neurons = experts = None
            if seen.attention:
                groups = OutputLayer.attention(
                    block, source.family, dims, Moments(seen.attention), settings
                )
            if seen.experts and source.family.experts:
                experts = ExpertLayer.of(block, source.family.experts, seen.experts, settings)
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
                    experts.shrink(_num_experts(widths, source.config)) if experts else None,
                    skip=widths.skip,
                )
                pruned = cut_block(block, template.block(position), source.family, dims, cut)
                walk.advance(pruned, index)
            dense.advance(block, index)
    compared = compare(dense, walks, next_tokens(fitness_NL).targets_NP)
    return [Candidate(plan, *found.kl) for plan, found in zip(plans, compared, strict=True)]


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
        _loses_heads(widths, dims)
        or _loses_neurons(widths, dims)
        or _loses_experts(widths, source.config)
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
            cutter = _Cutter(
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


def _loses_heads(widths: LayerPlan, dims: Dimensions) -> bool:
    """Whether some of the attention goes and some stays."""
    if "attention" in widths.skip:
        return False
    heads = widths.heads_per_group or dims.heads_per_group
    return (widths.num_key_value_heads, heads) != (dims.num_key_value_heads, dims.heads_per_group)


def _loses_neurons(widths: LayerPlan, dims: Dimensions) -> bool:
    return widths.intermediate_size < dims.intermediate_size and "mlp" not in widths.skip


def _loses_experts(widths: LayerPlan, config: PretrainedConfig) -> bool:
    if not family_of(config).experts:
        return False
    return _num_experts(widths, config) < config.num_experts


def _num_experts(widths: LayerPlan, config: PretrainedConfig) -> int:
    return widths.num_experts or config.num_experts


def _leave_out(source: BlockSource, index: int, streams: Streams | None) -> None:
    """Only the dense stream goes through a block that is dropped."""
    if streams and streams.dense:
        with source.block(index) as block:
            streams.dense.advance(block, index)


@dataclass(frozen=True)
class _Cutter:
    """Cuts one block to its widths."""

    block: nn.Module
    index: int
    position: int
    source: BlockSource
    dims: Dimensions
    settings: Prune
    widths: LayerPlan
    templates: Templates
    reorder: Reorder | None

    def whole(self) -> tuple[nn.Module, BlockReport]:
        """The block as it is."""
        return self._cut(*self._everything())

    def on_dense_stream(self, statistics: Statistics) -> tuple[nn.Module, BlockReport]:
        """Chosen and folded for the inputs that the dense model gives this block."""
        seen = statistics.block(self.index)
        groups, neurons, experts = self._everything()
        if seen.attention and "attention" not in self.widths.skip:
            groups = self._groups(Moments(seen.attention))
        if neurons and seen.mlp and "mlp" not in self.widths.skip:
            neurons = self._neurons(Moments(seen.mlp))
        if experts and seen.experts:
            experts = self._experts(seen.experts)
        return self._cut(groups, neurons, experts)

    def on_pruned_stream(self, streams: Streams) -> tuple[nn.Module, BlockReport]:
        """Chosen and folded for the inputs that the pruned model gives each half of the
        block, one half after the other; the walks end after the block."""
        family = self.source.family
        groups, neurons, experts = self._everything()
        if family.cuts_heads:
            groups = self._through_attention(streams)
        half = mlp_half(self.block, family)
        if neurons and _loses_neurons(self.widths, self.dims):
            neurons = self._neurons(streams.collect(half, self.index, family.mlp_output))
        else:
            if experts and _loses_experts(self.widths, self.source.config):
                experts = self._experts(streams.collect_experts(half, self.index))
            if streams.dense:
                streams.dense.advance(half, self.index)
        pruned, report = self._cut(groups, neurons, experts)
        streams.pruned.advance(mlp_half(pruned, family), self.index)
        return pruned, report

    def _through_attention(self, streams: Streams) -> Shrunk:
        """The groups and heads that stay; the walks end after the attention half."""
        half, output = parts(self.block, self.source.family)["attention"]
        groups, neurons, experts = self._everything()
        if not _loses_heads(self.widths, self.dims):
            whole = [streams.dense] if "attention" in self.widths.skip else streams.walks
            for walk in filter(None, whole):
                walk.advance(half, self.index)
            return groups
        seen: list[torch.Tensor] = []
        groups = self._groups(streams.collect(half, self.index, output, keep=seen))
        pruned, _ = self._cut(groups, neurons, experts)
        columns = cut_of(groups, neurons).query_columns(self.dims)
        streams.pruned.advance_replayed(pruned, self.index, seen, columns)
        return groups

    def _everything(self) -> tuple[Shrunk, Shrunk | None, ShrunkExperts | None]:
        """All that the plan's widths have room for: what is not cut stays as it is. No neurons
        in a model with experts, whose other layers keep their MLP; no experts in these."""
        config, neurons, experts = self.source.config, None, None
        if not self.source.family.experts:
            neurons = Shrunk(torch.arange(self.widths.intermediate_size))
        if has_experts(config, self.index):
            experts = ShrunkExperts(ExpertCut(torch.arange(_num_experts(self.widths, config))))
        return Shrunk(torch.arange(self.widths.num_key_value_heads)), neurons, experts

    def _groups(self, moments: Moments) -> Shrunk:
        layer = OutputLayer.attention(
            self.block, self.source.family, self.dims, moments, self.settings
        )
        if self.reorder:
            layer = self.reorder(self.index, self.source.family.attention_output, layer)
        return layer.shrink(self.widths.num_key_value_heads, parts=self.widths.heads_per_group)

    def _neurons(self, moments: Moments) -> Shrunk:
        kept = self.widths.intermediate_size
        layer = OutputLayer.mlp(self.block, self.source.family, moments, self.settings, kept)
        if self.reorder:
            layer = self.reorder(self.index, self.source.family.mlp_output, layer)
        return layer.shrink(kept)

    def _experts(self, moments: ExpertMoments) -> ShrunkExperts:
        experts = self.source.family.experts
        assert experts is not None
        layer = ExpertLayer.of(self.block, experts, moments, self.settings)
        return layer.shrink(_num_experts(self.widths, self.source.config))

    def _cut(
        self, groups: Shrunk, neurons: Shrunk | None, experts: ShrunkExperts | None
    ) -> tuple[nn.Module, BlockReport]:
        template = self.templates.block(self.position)
        cut = cut_of(groups, neurons, experts, skip=self.widths.skip)
        pruned = cut_block(self.block, template, self.source.family, self.dims, cut)
        report = BlockReport(
            neurons.report if neurons else None, groups.report, experts.report if experts else None
        )
        return pruned, report
