"""Cut one block to its widths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import BlockSource, mlp_half, parts
from hf_compress.model.experts import ExpertCut
from hf_compress.model.families import family_of, has_experts
from hf_compress.model.surgery import Dimensions, cut_block
from hf_compress.plan import LayerPlan
from hf_compress.pruning.expert_neurons import Mixture
from hf_compress.pruning.experts import ExpertLayer, ShrunkExperts
from hf_compress.pruning.layer import OutputLayer, Shrunk, cut_of
from hf_compress.pruning.reports import BlockReport
from hf_compress.pruning.streams import Reorder, Streams
from hf_compress.pruning.templates import Templates
from hf_compress.recipe import Prune
from hf_compress.statistics import ExpertMoments, Moments, Statistics


def loses_heads(widths: LayerPlan, dims: Dimensions) -> bool:
    """Whether some of the attention goes and some stays."""
    if "attention" in widths.skip:
        return False
    heads = widths.heads_per_group or dims.heads_per_group
    return (widths.num_key_value_heads, heads) != (dims.num_key_value_heads, dims.heads_per_group)


def loses_neurons(widths: LayerPlan, dims: Dimensions) -> bool:
    return widths.intermediate_size < dims.intermediate_size and "mlp" not in widths.skip


def loses_experts(widths: LayerPlan, config: PretrainedConfig) -> bool:
    if not family_of(config).experts:
        return False
    return num_experts_of(widths, config) < config.num_experts


def num_experts_of(widths: LayerPlan, config: PretrainedConfig) -> int:
    return widths.num_experts or config.num_experts


@dataclass(frozen=True)
class Cutter:
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
        if experts and loses_neurons(self.widths, self.dims):
            raise RecipeError(
                "the neurons of experts are chosen on the tokens that the pruned model routes to "
                "each of them; set recollect to true"
            )
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
        if neurons and loses_neurons(self.widths, self.dims):
            neurons = self._neurons(streams.collect(half, self.index, family.mlp_output))
        else:
            if experts and loses_experts(self.widths, self.source.config):
                experts = self._experts(streams.collect_experts(half, self.index))
            if experts:
                experts = self._expert_neurons(experts, streams)
            if streams.dense:
                streams.dense.advance(half, self.index)
        pruned, report = self._cut(groups, neurons, experts)
        streams.pruned.advance(mlp_half(pruned, family), self.index)
        return pruned, report

    def _through_attention(self, streams: Streams) -> Shrunk:
        """The groups and heads that stay; the walks end after the attention half."""
        half, output = parts(self.block, self.source.family)["attention"]
        groups, neurons, experts = self._everything()
        if not loses_heads(self.widths, self.dims):
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
            experts = ShrunkExperts(ExpertCut(torch.arange(num_experts_of(self.widths, config))))
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
        return layer.shrink(num_experts_of(self.widths, self.source.config))

    def _expert_neurons(self, experts: ShrunkExperts, streams: Streams) -> ShrunkExperts:
        mixture = Mixture(
            self.block, self.index, self.position, self.source, self.settings, self.templates
        )
        width = self.widths.intermediate_size
        return mixture.shrink(experts, [width], streams.collect_neurons)[width]

    def _cut(
        self, groups: Shrunk, neurons: Shrunk | None, experts: ShrunkExperts | None
    ) -> tuple[nn.Module, BlockReport]:
        template = self.templates.block(self.position)
        cut = cut_of(groups, neurons, experts, skip=self.widths.skip)
        pruned = cut_block(self.block, template, self.source.family, self.dims, cut)
        mlp = neurons.report if neurons else experts.output if experts else None
        report = BlockReport(
            mlp,
            groups.report,
            experts.report if experts else None,
            expert_neurons=experts.neurons if experts else None,
        )
        return pruned, report
