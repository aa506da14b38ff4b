"""Give every linear layer of a model other weights, block after block, sub-layer after sub-layer.

What becomes of a layer is the caller's; here stands how the model is walked: each sub-layer is
changed for the inputs that the layers before it, changed already, really give it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.model.blocks import BlockSource
from hf_compress.model.families import Sublayer
from hf_compress.model.layers import sublayers_of
from hf_compress.model.walk import Walk, finite_state
from hf_compress.statistics import Moments

Report = TypeVar("Report")


class LayerStreams(Protocol):
    """The calibration windows on their way through the model whose weights change."""

    def collect(
        self, sublayer: Sublayer, index: int, block: nn.Module, found: nn.Module
    ) -> Moments:
        """Moments of what a sub-layer of `block` reads; `found` is the block as it was."""
        ...

    def advance(self, sublayer: Sublayer, index: int, block: nn.Module, found: nn.Module) -> None:
        """Go on to the next sub-layer, through the changed one."""
        ...


Finish = Callable[[nn.Module, int, nn.Module], nn.Module]
"""`(block, index, found) -> block`: what becomes of a block once all of its layers have changed;
`found` is the block as it was."""
Change = Callable[[nn.Module, int, Sublayer, Moments | None], list[Report]]
"""`(block, index, sublayer, moments) -> reports`: overwrites the weights of one sub-layer of
block `index`, and says of each of its linear layers what was done."""


def rewrite_blocks(
    source: BlockSource,
    change: Change[Report],
    *,
    streams: LayerStreams | None,
    probe: Walk,
    write: Callable[[str, torch.Tensor], None],
    doing: str,
    done: str,
    finish: Finish | None = None,
) -> list[list[Report]]:
    """Change every block and hand its tensors to `write`.

    Args:
        change: what becomes of the layers of one sub-layer.
        streams: gather the statistics; None where none are needed.
        probe: a walk that follows the new model, for the check after saving.
        write: takes a tensor's name in the checkpoint, and the tensor.
        doing: names the work on the progress bar.
        finish: goes on with a block all of whose layers have changed, and carries the streams on.
        done: what was done to a weight, for the message where one is not finite.

    Returns:
        for each block, the reports of its linear layers.
    """
    reports = []
    for index in tqdm(range(source.config.num_hidden_layers), desc=doing, unit="block"):
        name = f"{source.family.layers}.{index}"
        with source.block(index) as found:
            block, report = copy.deepcopy(found), []
            for sublayer in sublayers_of(source.family, source.config, index):
                moments = streams.collect(sublayer, index, block, found) if streams else None
                report += change(block, index, sublayer, moments)
                if streams:
                    streams.advance(sublayer, index, block, found)
            if finish:
                block = finish(block, index, found)
        for key, value in finite_state(block, name, done):
            write(key, value)
        probe.advance(block, index)
        reports.append(report)
    return reports
