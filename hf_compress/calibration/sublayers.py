"""Second moments of what every linear layer of a block reads, one sub-layer after the other.

A stage that changes the weights of linear layers, whatever to, walks through a block like
this: collect for a sub-layer, change its layers, advance, on to the next sub-layer. Each is
then fitted to the inputs that it will really get. Which layers read one tensor is said by
`Family.sublayers`.

Legend: B windows, L tokens, T = B * L tokens, D hidden size, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import nn

from hf_compress.calibration.collect import _Sums, collect, collect_beside
from hf_compress.calibration.weighting import Weighting
from hf_compress.model.blocks import BlockSource, attention_half, mlp_half
from hf_compress.model.families import Sublayer
from hf_compress.model.layers import sublayers_of
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk, captured_input, require_finite
from hf_compress.statistics import Moments

Inputs = Callable[[Walk, torch.Tensor], torch.Tensor]
"""`(walk, hidden_BLD) -> inputs_BLI` of a linear layer for one batch."""


class SublayerStreams:
    """The calibration windows on their way through a model whose weights change.

    Args:
        source: the model as it was found.
        ids_NL: token ids, N windows of L tokens.
        beside: carry the model as it was found along, so that `Moments.cross` says where
            its stream goes.
        weighting: weight of a token in front of output layers, see `recipe.Calibrate`. What
            layers read through a norm has the same norm for every token already, and blocks
            that are not walked by halves have no stream between them to weigh by.
        batch_size: windows in one forward pass of a block.
    """

    def __init__(
        self,
        source: BlockSource,
        ids_NL: torch.Tensor,
        *,
        beside: bool,
        weighting: Weighting = "inverse_norm",
        batch_size: int = 8,
    ) -> None:
        self._source = source
        self._changed = Walk(source, ids_NL, batch_size)
        self._found = Walk(source, ids_NL, batch_size) if beside else None
        self._weighting = weighting
        self._inputs: list[torch.Tensor] = []

    def collect(
        self, sublayer: Sublayer, index: int, block: nn.Module, found: nn.Module
    ) -> Moments:
        """Moments of the inputs of a sub-layer.

        Args:
            block: block `index`, with the sub-layers before this one changed.
            found: the block as it was found.
        """
        family = self._source.family
        if not family.cuts_heads:
            return self._through_block(sublayer, index, block, found)
        if sublayer.norm:
            return self._through_norm(sublayer, sublayer.norm, index, block)
        half_of = attention_half if sublayer.in_attention else mlp_half
        half, name, keep = half_of(block, family), sublayer.linears[0], self._inputs
        if self._found is None:
            return collect(self._changed, half, index, name, self._weighting, keep=keep)
        moments = collect_beside(
            self._changed,
            self._found,
            half_of(found, family),
            index,
            name,
            self._weighting,
            pruned_half=half,
            keep=keep,
        )
        return moments if family.adds_outputs(self._source.config) else Moments(moments.gram)

    def advance(self, sublayer: Sublayer, index: int, block: nn.Module, found: nn.Module) -> None:
        """Carry the windows on, once the layers of `sublayer` have changed in `block`."""
        family = self._source.family
        if not family.cuts_heads:
            if sublayer == family.sublayers[-1]:
                self._changed.advance(block, index)
                if self._found:
                    self._found.advance(found, index)
        elif sublayer.norm:
            return
        else:
            of = "attention" if sublayer.in_attention else "mlp"
            self._changed.advance_replayed(block, index, self._inputs, of=of)
            self._inputs.clear()

    @property
    def beside(self) -> Walk | None:
        """The windows in the model as it was found."""
        return self._found

    def go_on_from(self, walk: Walk) -> None:
        """Have the windows in the changed model stand where those of `walk` do."""
        self._changed.hidden_NLD.copy_(walk.hidden_NLD)

    @torch.no_grad()
    def _through_norm(self, sublayer: Sublayer, norm: str, index: int, block: nn.Module) -> Moments:
        """What a norm makes of the stream is all that is needed."""
        read, device = block.get_submodule(norm), self._source.device

        def inputs(walk: Walk, hidden_BLD: torch.Tensor) -> torch.Tensor:
            return read(hidden_BLD.to(device))

        return self._of_inputs(sublayer, index, block, [inputs, inputs])

    def _through_block(
        self, sublayer: Sublayer, index: int, block: nn.Module, found: nn.Module
    ) -> Moments:
        """A block that is not walked by halves runs whole, once for each sub-layer."""

        def through(block: nn.Module) -> Inputs:
            def inputs(walk: Walk, hidden_BLD: torch.Tensor) -> torch.Tensor:
                with captured_input(block, sublayer.linears[0]) as captured:
                    walk.run(block, index, hidden_BLD)
                return captured[0]

            return inputs

        return self._of_inputs(sublayer, index, block, [through(block), through(found)])

    def _of_inputs(
        self, sublayer: Sublayer, index: int, block: nn.Module, inputs: list[Inputs]
    ) -> Moments:
        """Moments of the inputs of the changed model, and those of the found one beside."""
        family = self._source.family
        where = f"{family.layers}.{index}.{sublayer.linears[0]}"
        width = weight_of(block, sublayer.linears[0], family).shape[1]
        sums = _Sums.zeros(where, width, width if self._found else 0, self._source.device)
        batches = list(self._changed.batches())
        beside = list(self._found.batches()) if self._found else []
        for number, hidden_BLD in enumerate(batches):
            sums.part = int(number >= (len(batches) + 1) // 2)
            inputs_TI = inputs[0](self._changed, hidden_BLD).flatten(0, -2)
            require_finite(inputs_TI, f"the input of {where}")
            sums.add_inputs(inputs_TI)
            if self._found:
                found_TI = inputs[1](self._found, beside[number]).flatten(0, -2)
                sums.add_target(found_TI, inputs_TI)
        moments = sums.moments()
        if moments.cross:
            moments.cross.of_inputs = True
        return moments


def input_norms(
    source: BlockSource, ids_NL: torch.Tensor, batch_size: int = 8
) -> Iterator[dict[str, torch.Tensor]]:
    """Block by block, the norm ||x_j|| over all tokens [I] of every input of every linear
    layer, by the layer's name; the model is not changed."""
    walk, family = Walk(source, ids_NL, batch_size), source.family
    for index in range(source.config.num_hidden_layers):
        with source.block(index) as block:
            sublayers = sublayers_of(family, source.config, index)
            squares = {sublayer.linears[0]: torch.zeros(()) for sublayer in sublayers}
            for hidden_BLD in walk.batches():
                hidden_BLD.copy_(_add_squares(walk, block, index, hidden_BLD, squares))
        yield {
            name: squares[sublayer.linears[0]].sqrt()
            for sublayer in sublayers
            for name in sublayer.linears
        }


def _add_squares(
    walk: Walk,
    block: nn.Module,
    index: int,
    hidden_BLD: torch.Tensor,
    squares: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Add one batch to the sums of squares; returns what the block makes of it."""
    with ExitStack() as hooks:
        taken = {name: hooks.enter_context(captured_input(block, name)) for name in squares}
        result = walk.run(block, index, hidden_BLD)
    for name, captured in taken.items():
        batch_I = captured[0].float().square().flatten(0, -2).sum(0)
        squares[name] = squares[name].to(batch_I) + batch_I
    return result
