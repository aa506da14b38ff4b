"""Prune one decoder block: choose units by a criterion, fold the rest into the kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hf_compress.errors import ModelError
from hf_compress.model.families import Family
from hf_compress.model.surgery import Cut, Dimensions, expand
from hf_compress.plan import LayerPlan
from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.fold import choose_damping, fold, output_energy, output_error
from hf_compress.recipe import Prune
from hf_compress.statistics import BlockStatistics, GramPair

PROBE_DAMPING = 0.1
"""For comparing splits, where cross-validating every candidate would cost more than it
tells; it is what cross-validation picks most often."""


@dataclass(frozen=True)
class OutputLayer:
    """One output layer of a block, ready to lose columns."""

    weight_OI: torch.Tensor
    """float64."""
    pair: GramPair
    unit_width: int
    order_U: torch.Tensor
    """Units in order of removal."""

    @classmethod
    def of(
        cls, block: nn.Module, name: str, pair: GramPair, unit_width: int, criterion: str
    ) -> OutputLayer:
        weight_OI = block.get_submodule(name).weight.detach().double()  # type: ignore[union-attr,operator]
        pair = GramPair(*(half.to(weight_OI.device) for half in (pair.first_II, pair.second_II)))
        gram_II = pair.total_II
        if not gram_II.diagonal().mean() > 0:
            raise ModelError(
                f"the inputs of {name} are all zero on the calibration text; there is nothing to "
                "choose by. Use other text, or check the checkpoint"
            )
        return cls(weight_OI, pair, unit_width, CRITERIA[criterion](weight_OI, gram_II, unit_width))

    def kept(self, units: int) -> torch.Tensor:
        """Sorted indices of the `units` that stay."""
        return self.order_U[len(self.order_U) - units :].sort().values

    def columns(self, kept_units: torch.Tensor) -> torch.Tensor:
        return expand(kept_units, self.unit_width)


@dataclass(frozen=True)
class OutputReport:
    """What cutting one output layer did; errors relative to the output's energy."""

    error: float
    error_without_fold: float
    damping: float | None


@dataclass(frozen=True)
class BlockReport:
    """What cutting one block did; None where nothing was removed."""

    mlp: OutputReport | None
    attention: OutputReport | None


class BlockPruner:
    """The removal orders of one block, from which any width can be cut."""

    def __init__(
        self,
        block: nn.Module,
        statistics: BlockStatistics,
        family: Family,
        dims: Dimensions,
        settings: Prune,
    ) -> None:
        self._dims = dims
        self._settings = settings
        self._mlp = OutputLayer.of(block, family.mlp_output, statistics.mlp, 1, settings.criterion)
        self._attention = OutputLayer.of(
            block,
            family.attention_output,
            statistics.attention,
            dims.group_width,
            settings.criterion,
        )

    def probe(self, plan: LayerPlan) -> Cut:
        """A cut good enough to compare plans with: one damping for all layers."""
        return self._cut(plan, PROBE_DAMPING)[0]

    def cut(self, plan: LayerPlan) -> tuple[Cut, BlockReport]:
        """The cut, every damping cross-validated, and its report."""
        return self._cut(plan, None)

    def _cut(self, plan: LayerPlan, damping: float | None) -> tuple[Cut, BlockReport]:
        neurons, mlp_OS, mlp = self._shrink(self._mlp, plan.intermediate_size, damping)
        groups, attention_OS, attention = self._shrink(
            self._attention, plan.num_key_value_heads, damping
        )
        return Cut(neurons, groups, mlp_OS, attention_OS), BlockReport(mlp, attention)

    def _shrink(
        self, layer: OutputLayer, units: int, damping: float | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, OutputReport | None]:
        kept = layer.kept(units)
        if len(kept) == len(layer.order_U):
            return kept, None, None
        columns = layer.columns(kept)
        gram_II = layer.pair.total_II
        sliced = layer.weight_OI[:, columns]
        if not self._settings.fold:
            error = self._relative(layer, gram_II, columns, sliced)
            return kept, None, OutputReport(error, error, None)
        if damping is not None:
            return kept, fold(layer.weight_OI, gram_II, columns, damping), None
        damping = choose_damping(layer.weight_OI, layer.pair, columns)
        folded = fold(layer.weight_OI, gram_II, columns, damping)
        report = OutputReport(
            self._relative(layer, gram_II, columns, folded),
            self._relative(layer, gram_II, columns, sliced),
            damping,
        )
        return kept, folded, report

    @staticmethod
    def _relative(
        layer: OutputLayer, gram_II: torch.Tensor, columns: torch.Tensor, weight_OS: torch.Tensor
    ) -> float:
        energy = output_energy(layer.weight_OI, gram_II)
        return output_error(layer.weight_OI, gram_II, columns, weight_OS) / energy
