"""Linear layers of a whole model get codes, block after block, sub-layer after sub-layer.

Legend: O outputs (rows) of a linear layer, I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from hf_compress.block_learning import LearningReport
from hf_compress.formats.grid import Codes, Grid
from hf_compress.formats.layout import Layout, Stored
from hf_compress.model.blocks import BlockSource
from hf_compress.model.families import Sublayer
from hf_compress.model.memory import return_freed_memory
from hf_compress.model.rewrite import LayerStreams, rewrite_blocks
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk
from hf_compress.quantization.error_feedback import ErrorFeedback
from hf_compress.quantization.learned import learn_codes
from hf_compress.recipe import Quantize
from hf_compress.regression.curvature import Curvature
from hf_compress.regression.target import wanted
from hf_compress.statistics import Moments


class Streams(LayerStreams, Protocol):
    """The same, and the way back from codes that were learned of a whole block."""

    @property
    def beside(self) -> Walk | None:
        """The windows in the model as it was found."""
        ...

    def go_on_from(self, walk: Walk) -> None:
        """Have the windows in the changed model stand where those of `walk` do."""
        ...


@dataclass(frozen=True)
class LinearReport:
    """What codes in closed form did to one linear layer.

    Attributes:
        name: relative to its block.
        error: share of the wanted output's energy that is lost; None without statistics.
        error_nearest: the same of the weight that was found, rounded to nearest.
    """

    name: str
    error: float | None
    error_nearest: float | None


@dataclass
class BlockQuantizer:
    """Changes the blocks of one model; what `rewrite_blocks` asks for.

    Attributes:
        layouts: of the linear layers to quantize, by their names in the whole model.
        streams: gather the statistics; None rounds to nearest.
        learned: with effort `best`, a walk that stands before the block that comes next.
        learning: how the error of each block fell.
    """

    source: BlockSource
    settings: Quantize
    layouts: Mapping[str, Layout]
    streams: Streams | None
    learned: Walk | None = None
    learning: list[LearningReport] = field(default_factory=list)
    _packed: dict[str, Stored] = field(default_factory=dict)
    _codes: dict[str, Codes] = field(default_factory=dict)

    def run(
        self,
        probe: Walk,
        write: Callable[[str, torch.Tensor], None],
        write_packed: Callable[[str, Stored], None],
    ) -> list[list[LinearReport]]:
        """Quantize every block and hand its tensors on.

        Args:
            probe: a walk that follows the new model, for the check after saving.
            write: takes a tensor's name in the model, and the tensor.
            write_packed: takes the name of a quantized weight, and what is stored of it.
        """

        def put(name: str, tensor: torch.Tensor) -> None:
            if name in self._packed:
                write_packed(name, self._packed.pop(name))
            else:
                write(name, tensor)

        return rewrite_blocks(
            self.source,
            self._change,
            streams=self.streams,
            probe=probe,
            write=put,
            doing="quantize",
            done="quantized",
            finish=self._learn if self.learned else None,
        )

    def _change(
        self, block: nn.Module, index: int, sublayer: Sublayer, moments: Moments | None
    ) -> list[LinearReport]:
        feedback = ErrorFeedback(Curvature(moments.gram.total_II)) if moments else None
        reports = []
        for name in sublayer.linears:
            layout = self.layouts.get(self._full(index, name))
            if layout is None:
                continue
            weight_OI = weight_of(block, name, self.source.family).detach()
            if feedback is None or moments is None:
                self._store(index, name, weight_OI, layout.nearest(weight_OI))
                reports.append(LinearReport(name, None, None))
            else:
                wanted_OI = wanted(weight_OI.float(), moments, self.settings.correction)
                reports.append(self._choose(index, name, weight_OI, wanted_OI, feedback))
        return_freed_memory()
        return reports

    def _choose(
        self,
        index: int,
        name: str,
        weight_OI: torch.Tensor,
        wanted_OI: torch.Tensor,
        feedback: ErrorFeedback,
    ) -> LinearReport:
        """Codes in closed form, in the place of one weight."""
        layout = self.layouts[self._full(index, name)]
        nearest_OI = layout.unpack(layout.nearest(weight_OI), torch.float32)
        codes = feedback.quantize(wanted_OI, self._grid(index, name, weight_OI))
        self._store(index, name, weight_OI, layout.pack(codes, weight_OI.dtype))
        self._codes[name] = codes
        error = feedback.curvature.error
        energy = error(wanted_OI)
        lost = error(wanted_OI - weight_OI.float()) / energy
        return LinearReport(name, lost, error(wanted_OI - nearest_OI) / energy)

    def _learn(self, block: nn.Module, index: int, found: nn.Module) -> nn.Module:
        """The block with codes that were learned; the streams go on from what it gives."""
        assert self.learned is not None and self.streams and self.streams.beside  # see Quantize
        codes, self._codes = self._codes, {}
        if codes:
            family = self.source.family
            grids = {
                name: self._grid(index, name, weight_of(block, name, family)) for name in codes
            }
            block, codes, report = learn_codes(
                block, found, codes, grids, index, self.learned, self.streams.beside, self.settings
            )
            self.learning.append(report)
        for name, each in codes.items():
            weight_OI = weight_of(block, name, self.source.family).detach()
            layout = self.layouts[self._full(index, name)]
            self._store(index, name, weight_OI, layout.pack(each, weight_OI.dtype))
        self.learned.advance(block, index)
        self.streams.go_on_from(self.learned)
        return block

    def _store(self, index: int, name: str, weight_OI: torch.Tensor, stored: Stored) -> None:
        """Keep what will be written of a weight, and put what is read back in its place."""
        full = self._full(index, name)
        self._packed[f"{full}.weight"] = stored
        weight_OI.copy_(self.layouts[full].unpack(stored, weight_OI.dtype))

    def _grid(self, index: int, name: str, weight_OI: torch.Tensor) -> Grid:
        layout = self.layouts[self._full(index, name)]
        return layout.grid(weight_OI.dtype).to(weight_OI.device)

    def _full(self, index: int, name: str) -> str:
        """The name in the whole model of a layer of block `index`."""
        return f"{self.source.family.layers}.{index}.{name}"
