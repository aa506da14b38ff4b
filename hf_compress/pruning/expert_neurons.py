"""Which neurons stay inside each expert of a mixture, as many in every one, with the others
folded into them.

An expert is an MLP that sees only the tokens that are routed to it, and of some experts those
are few. Both the choice and the fold then trust the Gram matrix less, each by its own rule:

- The choice shrinks the matrix toward its diagonal (Ledoit and Wolf 2004, with another target):
  how strongly a neuron fires is known from a few tokens, with which others it fires only from
  many. From `obs` it so becomes `wanda`, and, without any token, `magnitude`.
- The fold has to lower the error on the other half of the text, or the neurons are dropped.

Legend: N neurons of one expert, S kept ones, E experts, O outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hf_compress.model.blocks import BlockSource, mlp_half
from hf_compress.model.experts import output_weight, stack_outputs
from hf_compress.model.surgery import Cut, Dimensions, cut_block
from hf_compress.pruning.criteria import CRITERIA, magnitude
from hf_compress.pruning.experts import ShrunkExperts
from hf_compress.pruning.layer import OutputLayer, Shrunk
from hf_compress.pruning.reports import ExpertNeuronReport, OutputReport
from hf_compress.pruning.streams import CollectNeurons
from hf_compress.pruning.templates import Templates
from hf_compress.recipe import Prune
from hf_compress.statistics import Moments, NeuronMoments

TRUST = 2.0
"""How fast tokens for each neuron outweigh the diagonal. Measured on one MLP of SmolLM2-135M (30 %
removed by `obs`, folded, other text): with 1/4, 1, 4 and 12 tokens for each neuron an error of
.161, .138, .123 and .116, where the matrix itself gave .190, .145, .124 and .116, and its diagonal
.162, .140, .125 and .119."""


@dataclass(frozen=True)
class Mixture:
    """The experts of one block that are about to lose neurons."""

    block: nn.Module
    index: int
    position: int
    source: BlockSource
    settings: Prune
    templates: Templates

    def shrink(
        self,
        experts: ShrunkExperts,
        widths: Collection[int],
        collect: CollectNeurons,
        damping: float | None = None,
    ) -> dict[int, ShrunkExperts]:
        """The experts that stay at each of `widths`, from one order an expert.

        Args:
            experts: which ones these are, with all their neurons.
            collect: gathers what their neurons do, once the others are gone.
            damping: of the fold; None lets the halves of the text choose it, and whether it pays.
        """
        whole = Dimensions.of(self.source.config).intermediate_size
        narrow = {width for width in widths if width < whole}
        shrunk = dict.fromkeys(widths, experts)
        if narrow:
            thinner = self._thinner(experts)
            seen = collect(mlp_half(thinner, self.source.family), self.index)
            for width, stack in self._stacks(thinner, seen, narrow, damping).items():
                shrunk[width] = stack.on(experts)
        return shrunk

    def _thinner(self, experts: ShrunkExperts) -> nn.Module:
        """The block without the experts that go, and otherwise as it is."""
        dims, count = Dimensions.of(self.source.config), len(experts.cut.kept)
        if count == self.source.config.num_experts:
            return self.block
        template = self.templates.with_experts(count).block(self.position)
        cut = Cut(None, torch.arange(dims.num_key_value_heads), experts=experts.cut)
        return cut_block(self.block, template, self.source.family, dims, cut)

    def _stacks(
        self,
        thinner: nn.Module,
        seen: Iterable[NeuronMoments],
        widths: Collection[int],
        damping: float | None,
    ) -> dict[int, _Stack]:
        family = self.source.family
        assert family.experts is not None
        stored = thinner.get_parameter(family.experts.output)
        stacks = {width: _Stack(self.source, stored.dtype) for width in widths}
        for moments in seen:
            weight_ON = output_weight(thinner, family.experts, moments.expert).detach()
            layer = _layer(weight_ON, moments, self.settings, min(widths))
            for width, stack in stacks.items():
                stack.add(layer, _shrunk(layer, moments, width, damping), moments)
        return stacks


@dataclass
class _Stack:
    """Experts at one width, as they come."""

    source: BlockSource
    dtype: torch.dtype
    neurons: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)
    """Of each expert, in the unit that all share: with and without the fold."""
    energy: float = 0.0
    dampings: list[float] = field(default_factory=list)
    few_tokens: int = 0

    def add(self, layer: OutputLayer, shrunk: Shrunk, moments: NeuronMoments) -> None:
        weight_OS = shrunk.weight_OS
        if weight_OS is None:
            weight_OS = layer.weight_OI[:, shrunk.units]
        self.neurons.append(shrunk.units)
        self.weights.append(weight_OS.to(self.dtype))
        self.few_tokens += moments.tokens < layer.weight_OI.shape[1]
        if shrunk.report is not None:
            energy, report = layer.total.energy, shrunk.report
            self.energy += energy
            self.errors.append((report.error * energy, report.error_without_fold * energy))
            if report.damping is not None:
                self.dampings.append(report.damping)

    def on(self, experts: ShrunkExperts) -> ShrunkExperts:
        """The same experts with what is left of their neurons."""
        family = self.source.family
        assert family.experts is not None
        final = {family.experts.output: stack_outputs(self.weights, family.experts)}
        cut = replace(experts.cut, neurons=torch.stack(self.neurons), final=final)
        not_folded = len(self.neurons) - len(self.dampings)
        return replace(
            experts,
            cut=cut,
            output=self._report(),
            neurons=ExpertNeuronReport(self.few_tokens, not_folded),
        )

    def _report(self) -> OutputReport | None:
        """Of all experts together; the damping is the median one."""
        if not self.energy:
            return None
        folded, dropped = (sum(each) / self.energy for each in zip(*self.errors, strict=True))
        dampings = sorted(self.dampings)
        return OutputReport(folded, dropped, dampings[len(dampings) // 2] if dampings else None)


def selection_gram(gram_NN: torch.Tensor, tokens: int) -> torch.Tensor:
    """The Gram matrix, float64, as far as so many tokens are to be trusted with a choice."""
    share = 1 / (1 + (TRUST * tokens / len(gram_NN)) ** 2)
    shrunk_NN = (1 - share) * gram_NN
    shrunk_NN.diagonal().copy_(gram_NN.diagonal())
    return shrunk_NN


def _layer(
    weight_ON: torch.Tensor, moments: NeuronMoments, settings: Prune, fewest: int
) -> OutputLayer:
    """One expert's output layer and the order in which its neurons may go."""
    weight_ON = weight_ON.double()
    gram_NN = moments.gram.total_II
    criterion = CRITERIA[settings.criterion] if gram_NN.diagonal().mean() > 0 else magnitude
    order_N = criterion(weight_ON, selection_gram(gram_NN, moments.tokens), 1, fewest, 1)
    return OutputLayer.ordered(weight_ON, Moments(moments.gram), settings, order_N)


def _shrunk(
    layer: OutputLayer, moments: NeuronMoments, width: int, damping: float | None
) -> Shrunk:
    """The layer on `width` neurons; merely dropped, where a half of the text has no token for it,
    and so nothing to be held against the other."""
    halves = (moments.gram.first_II, moments.gram.second_II)
    if all(bool(half_NN.diagonal().mean() > 0) for half_NN in halves):
        return layer.shrink(width, damping)
    if layer.total.energy > 0:
        unfolded = layer.settings.model_copy(update={"fold": False})
        return replace(layer, settings=unfolded).shrink(width)
    return Shrunk(layer.order_U[-width:].sort().values)
