"""Shrink one output layer: choose units by a criterion, fold the rest into the kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hf_compress.errors import ModelError
from hf_compress.model.families import Family
from hf_compress.model.surgery import Cut, Dimensions, expand
from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.fold import choose_damping, fold, output_energy, output_error
from hf_compress.recipe import Prune
from hf_compress.statistics import GramPair

PROBE_DAMPING = 0.1
"""For comparing splits, where cross-validating every candidate would cost more than it
tells; it is what cross-validation picks most often."""


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


@dataclass(frozen=True)
class Shrunk:
    """What is left of an output layer.

    Attributes:
        units: sorted indices of the kept units.
        weight_OS: weight on the kept columns, float64, or None to slice the original.
        report: None where nothing was removed.
    """

    units: torch.Tensor
    weight_OS: torch.Tensor | None = None
    report: OutputReport | None = None


@dataclass(frozen=True)
class OutputLayer:
    """The weight and inputs of one output layer, and the order in which units may go."""

    weight_OI: torch.Tensor
    """float64."""
    pair: GramPair
    unit_width: int
    order_U: torch.Tensor

    @classmethod
    def attention(
        cls, block: nn.Module, family: Family, dims: Dimensions, pair: GramPair, settings: Prune
    ) -> OutputLayer:
        """The layer whose units are KV groups."""
        return cls._of(block, family.attention_output, pair, dims.group_width, settings, 0)

    @classmethod
    def mlp(
        cls, block: nn.Module, family: Family, pair: GramPair, settings: Prune, fewest: int
    ) -> OutputLayer:
        """The layer whose units are MLP neurons; never asked to keep less than `fewest`."""
        return cls._of(block, family.mlp_output, pair, 1, settings, fewest)

    @classmethod
    def _of(
        cls,
        block: nn.Module,
        name: str,
        pair: GramPair,
        unit_width: int,
        settings: Prune,
        fewest: int,
    ) -> OutputLayer:
        weight_OI = block.get_submodule(name).weight.detach().double()  # type: ignore[union-attr,operator]
        pair = GramPair(*(half.to(weight_OI.device) for half in (pair.first_II, pair.second_II)))
        gram_II = pair.total_II
        if not gram_II.diagonal().mean() > 0:
            raise ModelError(
                f"the inputs of {name} are all zero on the calibration text; there is nothing to "
                "choose by. Use other text, or check the checkpoint"
            )
        order_U = CRITERIA[settings.criterion](weight_OI, gram_II, unit_width, fewest)
        return cls(weight_OI, pair, unit_width, order_U)

    def shrink(self, units: int, settings: Prune, damping: float | None = None) -> Shrunk:
        """Keep `units`; without a damping, the one that cross-validation picks.

        With a damping given there is no report: nobody looks at a probe's errors.
        """
        kept = self.order_U[len(self.order_U) - units :].sort().values
        if units == len(self.order_U):
            return Shrunk(kept)
        columns = expand(kept, self.unit_width)
        gram_II = self.pair.total_II
        if damping is not None:
            folded_OS = fold(self.weight_OI, gram_II, columns, damping) if settings.fold else None
            return Shrunk(kept, folded_OS)
        energy = output_energy(self.weight_OI, gram_II)

        def relative(weight_OS: torch.Tensor) -> float:
            return output_error(self.weight_OI, gram_II, columns, weight_OS) / energy

        dropped = relative(self.weight_OI[:, columns])
        if not settings.fold:
            return Shrunk(kept, None, OutputReport(dropped, dropped, None))
        damping = choose_damping(self.weight_OI, self.pair, columns)
        folded_OS = fold(self.weight_OI, gram_II, columns, damping)
        return Shrunk(kept, folded_OS, OutputReport(relative(folded_OS), dropped, damping))


def cut_of(attention: Shrunk, mlp: Shrunk) -> Cut:
    """What surgery needs to know of both layers."""
    return Cut(mlp.units, attention.units, mlp.weight_OS, attention.weight_OS)
