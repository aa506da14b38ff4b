"""Linear layers of a whole model get codes, block after block, sub-layer after sub-layer.

Legend: O outputs (rows) of a linear layer, I inputs (columns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_compress.formats.layout import Layout, Stored
from hf_compress.model.blocks import BlockSource
from hf_compress.model.families import Sublayer
from hf_compress.model.memory import return_freed_memory
from hf_compress.model.rewrite import LayerStreams, rewrite_blocks
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk
from hf_compress.quantization.error_feedback import ErrorFeedback
from hf_compress.recipe import Quantize
from hf_compress.regression.curvature import Curvature
from hf_compress.regression.target import wanted
from hf_compress.statistics import Moments


@dataclass(frozen=True)
class LinearReport:
    """What codes did to one linear layer.

    Attributes:
        name: relative to its block.
        error: share of the wanted output's energy that is lost; None without statistics.
        error_nearest: the same of the weight that was found, rounded to nearest.
    """

    name: str
    error: float | None
    error_nearest: float | None


def quantize_blocks(
    source: BlockSource,
    settings: Quantize,
    layouts: Mapping[str, Layout],
    *,
    streams: LayerStreams | None,
    probe: Walk,
    write: Callable[[str, torch.Tensor], None],
    write_packed: Callable[[str, Stored], None],
) -> list[list[LinearReport]]:
    """Quantize linear layers in every block and hand its tensors on.

    Args:
        layouts: of the linear layers to quantize, by their names in the model.
        streams: gather the statistics; None rounds to nearest.
        probe: a walk that follows the new model, for the check after saving.
        write: takes a tensor's name in the model, and the tensor.
        write_packed: takes the name of a quantized weight, and what is stored of it.
    """
    packed: dict[str, Stored] = {}

    def change(
        block: nn.Module, index: int, sublayer: Sublayer, moments: Moments | None
    ) -> list[LinearReport]:
        feedback = ErrorFeedback(Curvature(moments.gram.total_II)) if moments else None
        reports = []
        for name in sublayer.linears:
            full = f"{source.family.layers}.{index}.{name}"
            if full in layouts:
                weight_OI = weight_of(block, name, source.family).detach()
                stored, report = _quantize(name, weight_OI, layouts[full], feedback, moments)
                packed[f"{full}.weight"] = stored
                reports.append(report)
        return_freed_memory()
        return reports

    def _quantize(
        name: str,
        weight_OI: torch.Tensor,
        layout: Layout,
        feedback: ErrorFeedback | None,
        moments: Moments | None,
    ) -> tuple[Stored, LinearReport]:
        nearest = layout.nearest(weight_OI)
        if feedback is None or moments is None:
            weight_OI.copy_(layout.unpack(nearest, weight_OI.dtype))
            return nearest, LinearReport(name, None, None)
        wanted_OI = wanted(weight_OI.float(), moments, settings.correction)
        grid = layout.grid(weight_OI.dtype).to(weight_OI.device)
        stored = layout.pack(feedback.quantize(wanted_OI, grid), weight_OI.dtype)
        rounded_OI = layout.unpack(nearest, torch.float32)
        weight_OI.copy_(layout.unpack(stored, weight_OI.dtype))
        error = feedback.curvature.error
        energy = error(wanted_OI)
        lost = error(wanted_OI - weight_OI.float()) / energy
        return stored, LinearReport(name, lost, error(wanted_OI - rounded_OI) / energy)

    def put(name: str, tensor: torch.Tensor) -> None:
        if name in packed:
            write_packed(name, packed.pop(name))
        else:
            write(name, tensor)

    return rewrite_blocks(
        source,
        change,
        streams=streams,
        probe=probe,
        write=put,
        doing="quantize",
        done="quantized",
    )
