"""Cutting channels of the residual stream: which tensors lose which columns, rows, entries.

A channel's column of the embedding and of the head, its entry of every norm on the stream, its
input column of what reads the stream and its output row of what writes to it go together.
Norms inside heads and biases of readers have no channel, and stay.

Legend: D channels (`hidden_size`), S kept ones, O outputs, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.model.blocks import BlockSource, without_blocks
from hf_compress.model.families import Family

FINAL_NORM = "model.norm"
"""The norm behind the last block, in all families whose stream can be narrowed."""
ROWS = 8192
"""Of a weight, that are in memory in float64 at once: a head has as many as the vocabulary."""


def cut_channels(
    block: nn.Module, template: nn.Module, family: Family, kept_S: torch.Tensor
) -> nn.Module:
    """A new block: `template` (meta device, right widths) filled with the kept channels."""
    state = block.state_dict()
    norms = (family.attention_norm, family.mlp_norm)
    dims = {f"{name}.weight": 1 for name in (*family.attention_inputs, *family.mlp_inputs)}
    for name in (*norms, family.attention_output, family.mlp_output):
        dims |= {f"{name}.weight": 0, f"{name}.bias": 0}
    return _filled(template, state, dims, kept_S).eval()


def cut_skeleton(
    skeleton: PreTrainedModel, model: PreTrainedModel, family: Family, kept_S: torch.Tensor
) -> PreTrainedModel:
    """What is not in a block, on the kept channels.

    Args:
        skeleton: of the model as it was found.
        model: the narrower model, on the meta device.
    """
    dims = {name: 1 for name, value in skeleton.state_dict().items() if value.dim() == 2}
    dims[f"{FINAL_NORM}.weight"] = 0
    template = without_blocks(model, family)
    narrow: PreTrainedModel = _filled(template, skeleton.state_dict(), dims, kept_S)  # type: ignore[assignment]
    narrow.tie_weights()
    return narrow.to(skeleton.device).eval()


def readers_of(skeleton: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The head, and the norm that it reads the stream through."""
    return skeleton.get_output_embeddings(), skeleton.get_submodule(FINAL_NORM)


def _filled(
    template: nn.Module,
    state: Mapping[str, torch.Tensor],
    dims: Mapping[str, int],
    kept_S: torch.Tensor,
) -> nn.Module:
    twin = copy.deepcopy(template)
    cut = {
        name: value.index_select(dims[name], kept_S.to(value.device)) if name in dims else value
        for name, value in state.items()
    }
    twin.load_state_dict(cut, assign=True)
    return twin


def channel_parameters(model: PreTrainedModel, family: Family) -> int:
    """Parameters that go with one channel of the residual stream, embeddings not counted."""
    total = 1  # of the final norm
    for block in model.get_submodule(family.layers).children():
        total += 2  # of the norms
        for name in (*family.attention_inputs, *family.mlp_inputs):
            total += block.get_submodule(name).weight.shape[0]  # type: ignore[union-attr,index]
        for name in (family.attention_output, family.mlp_output):
            writer = block.get_submodule(name)
            total += writer.weight.shape[1] + (writer.bias is not None)  # type: ignore[union-attr,index,operator]
    return total


def gram_of_rows(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of W^T W [D, D] over weights [O, D], float64."""
    return sum(  # type: ignore[return-value]
        chunk_OD.double().T @ chunk_OD.double()
        for weight_OD in weights
        for chunk_OD in weight_OD.detach().split(ROWS)
    )


class NarrowSource:
    """What a `Walk` asks for, of a model whose blocks are being narrowed: it has a skeleton of
    its own, the same one at every call, and no blocks.

    Args:
        source: the model as it was found.
        model: the narrower model, on the meta device.
        kept_S: sorted indices of the channels that it keeps.
    """

    def __init__(self, source: BlockSource, model: PreTrainedModel, kept_S: torch.Tensor) -> None:
        self.config: PretrainedConfig = model.config
        self.family = source.family
        self.dtype = source.dtype
        self.device = source.device
        self._skeleton = cut_skeleton(source.skeleton(), model, source.family, kept_S)

    def skeleton(self) -> PreTrainedModel:
        return self._skeleton

    def block(self, index: int) -> nn.Module:
        raise NotImplementedError(f"block {index} is not kept once it is written")
