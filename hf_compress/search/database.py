"""Every width of every sub-layer, from one removal order: what it loses, and its weights.

Orders and errors are computed once and kept; weights at a level are folded when a genome first
asks for them, with the one damping of `PROBE_DAMPING`, and kept on disk as well.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from hf_compress.model.blocks import BlockSource
from hf_compress.model.surgery import Dimensions, cut_block
from hf_compress.plan import LayerPlan, Plan
from hf_compress.pruning.layer import PROBE_DAMPING, OutputLayer, Shrunk, cut_of
from hf_compress.pruning.templates import Templates
from hf_compress.recipe import Prune
from hf_compress.search.space import Choice, Kind, Space, whole_layer
from hf_compress.statistics import Moments, Statistics


def build_database(
    source: BlockSource, statistics: Statistics, space: Space, settings: Prune, folder: Path
) -> None:
    """Removal orders and the error of every level, one file a block.

    Errors are shares of the energy of what the sub-layer gives, after folding; 1 where it is
    left out and 0 where it is whole.
    """
    dims = Dimensions.of(source.config)
    for layer in tqdm(range(source.config.num_hidden_layers), desc="errors", unit="block"):
        tensors = {}
        with source.block(layer) as block:
            for choice in space.choices[2 * layer : 2 * layer + 2]:
                output = _output(choice.kind, block, source, dims, statistics, layer, settings)
                errors_U = output.errors(PROBE_DAMPING).cpu()
                tensors[f"{choice.kind}.order"] = output.order_U.cpu()
                tensors[f"{choice.kind}.errors"] = errors_U[list(choice.levels)].float()
        save_file(tensors, _orders(folder, layer))


class Database:
    """What `build_database` wrote, and the weights that were asked for since.

    Args:
        folder: of the orders and errors.
        weights: folder for folded weights; they are rebuilt where they are missing.
    """

    def __init__(
        self,
        source: BlockSource,
        statistics: Statistics,
        space: Space,
        settings: Prune,
        folder: Path,
        weights: Path,
    ) -> None:
        self.source = source
        self.space = space
        self._statistics = statistics
        self._settings = settings
        self._dims = Dimensions.of(source.config)
        self._folder = folder
        self._weights = weights
        self._templates: dict[tuple[int, int, int], Templates] = {}

    def forget_weights(self) -> None:
        """Give the disk back; weights that are asked for again are folded again."""
        shutil.rmtree(self._weights, ignore_errors=True)

    def errors(self, choice: Choice) -> torch.Tensor:
        """Of every level of a choice, float32."""
        return load_file(_orders(self._folder, choice.layer))[f"{choice.kind}.errors"]

    def shrunk(self, block: nn.Module, layer: int, kind: Kind, units: int) -> Shrunk:
        """One sub-layer of `block` at a level that is not 0."""
        file = self._weights / f"{layer:05d}-{kind}-{units}.safetensors"
        if not file.is_file():
            self._weights.mkdir(parents=True, exist_ok=True)
            output = self._output(block, layer, kind)
            shrunk = output.shrink(units, PROBE_DAMPING)
            tensors = {"units": shrunk.units.cpu().contiguous()}
            if shrunk.weight_OS is not None:
                tensors["weight"] = shrunk.weight_OS.to(self.source.dtype).cpu().contiguous()
            partial = file.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(file)
        tensors = load_file(file)
        return Shrunk(tensors["units"], tensors.get("weight"))

    def cut(self, block: nn.Module, layer: int, groups: int, neurons: int) -> nn.Module:
        """The block at these widths, neither of which is 0."""
        if (groups, neurons) == self.space.units(self.space.dense, layer):
            return block
        cut = cut_of(
            self.shrunk(block, layer, "attention", groups),
            self.shrunk(block, layer, "mlp", neurons),
        )
        template = self._template(layer, groups, neurons)
        return cut_block(block, template, self.source.family, self._dims, cut)

    def _template(self, layer: int, groups: int, neurons: int) -> nn.Module:
        """A block without weights, of a model that has these widths in every layer but one
        other: as a checkpoint whose layers differ, it may have any."""
        last = self.space.num_layers - 1
        spared = 0 if layer == last else last
        key = spared, groups, neurons
        if key not in self._templates:
            widths = LayerPlan(num_key_value_heads=groups, intermediate_size=neurons)
            whole = whole_layer(self.source.config)
            layers = [whole if index == spared else widths for index in range(last + 1)]
            plan = Plan(model_type=self.space.model_type, layers=layers)
            self._templates[key] = Templates(self.source, plan)
        return self._templates[key].block(layer)

    def _output(self, block: nn.Module, layer: int, kind: Kind) -> OutputLayer:
        order_U = load_file(_orders(self._folder, layer))[f"{kind}.order"]
        return _output(
            kind, block, self.source, self._dims, self._statistics, layer, self._settings, order_U
        )


def _output(
    kind: Kind,
    block: nn.Module,
    source: BlockSource,
    dims: Dimensions,
    statistics: Statistics,
    layer: int,
    settings: Prune,
    order_U: torch.Tensor | None = None,
) -> OutputLayer:
    seen = statistics.block(layer)
    if kind == "attention":
        assert seen.attention is not None
        moments = Moments(seen.attention)
        return OutputLayer.attention(block, source.family, dims, moments, settings, order_U)
    assert seen.mlp is not None
    return OutputLayer.mlp(block, source.family, Moments(seen.mlp), settings, 0, order_U)


def _orders(folder: Path, layer: int) -> Path:
    return folder / f"block-{layer:05d}.safetensors"
