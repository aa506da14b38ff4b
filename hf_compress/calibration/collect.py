"""Gram matrices of the inputs of `o_proj` and `down_proj`, block by block.

Legend: B windows, L tokens, T = B * L tokens, D hidden size, I inputs of an output layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.model.blocks import BlockSource
from hf_compress.model.walk import Walk, captured_inputs, check_weights, require_finite
from hf_compress.statistics import BlockStatistics, GramPair, write_block, write_summary

logger = logging.getLogger(__name__)

Weighting = Literal["inverse_norm", "none"]
TILE = 384
"""Columns of a Gram matrix computed at a time; only tiles on or above the diagonal are."""


def calibrate(
    source: BlockSource,
    ids_NL: torch.Tensor,
    folder: Path,
    *,
    weighting: Weighting = "inverse_norm",
    batch_size: int = 8,
) -> None:
    """Run the calibration windows through the dense model; write statistics to `folder`.

    Args:
        source: the model, in memory or streamed.
        ids_NL: token ids, N windows of L tokens.
        folder: existing folder for the statistics.
        weighting: weight of a token, see `recipe.Calibrate`.
        batch_size: windows in one forward pass of a block.

    Raises:
        ModelError: a weight or an activation is not finite; the message names the layer.
    """
    walk = Walk(source, ids_NL, batch_size)
    count = source.config.num_hidden_layers
    _warn_if_few_tokens(len(ids_NL), ids_NL.shape[1], source.config.intermediate_size)
    for index in tqdm(range(count), desc="calibrate", unit="block"):
        with source.block(index) as block:
            check_weights(block, f"{source.family.layers}.{index}")
            statistics = collect_block(walk, block, index, weighting, advance=True)
        write_block(folder, index, statistics)
    write_summary(folder, ids_NL.numel(), count)


def collect_block(
    walk: Walk,
    block: nn.Module,
    index: int,
    weighting: Weighting,
    *,
    advance: bool,
    observe: Callable[[int, torch.Tensor], None] | None = None,
) -> BlockStatistics:
    """Statistics of one block on the walk's present hidden states.

    Args:
        advance: overwrite the hidden states with the block's outputs.
        observe: called for every batch with its number and the inputs [B, L, I] of the
            attention output layer, for a caller that can use them again.
    """
    family, device = walk.source.family, walk.source.device
    names = [family.attention_output, family.mlp_output, family.mlp_norm]
    widths = [block.get_submodule(name).weight.shape[1] for name in names[:2]]  # type: ignore[index,union-attr]
    attention, mlp = (GramPair.zeros(int(width), device) for width in widths)
    batches = list(walk.batches())
    with captured_inputs(block, names) as inputs:
        for number, hidden_BLD in enumerate(batches):
            output_BLD = walk.run(block, index, hidden_BLD)
            require_finite(output_BLD, f"the output of {family.layers}.{index}")
            half = "first_II" if number < (len(batches) + 1) // 2 else "second_II"
            for name, pair, residual_BLD in (
                (family.attention_output, attention, inputs[family.mlp_norm]),
                (family.mlp_output, mlp, output_BLD),
            ):
                accumulate_gram(getattr(pair, half), inputs[name], residual_BLD, weighting)
            if observe:
                observe(number, inputs[family.attention_output])
            if advance:
                hidden_BLD.copy_(output_BLD)
    for pair in (attention, mlp):
        _mirror(pair.first_II)
        _mirror(pair.second_II)
    return BlockStatistics(attention, mlp)


def accumulate_gram(
    gram_II: torch.Tensor,
    inputs_BLI: torch.Tensor,
    residual_BLD: torch.Tensor,
    weighting: Weighting,
) -> None:
    """Add sum_t w_t x_t x_t^T to the tiles of `gram_II` on and above the diagonal.

    float32 throughout. `inverse_norm`: w_t = 1 / mean(h_t^2) of the residual stream that
    the layer's output is added to, which is what the next RMSNorm divides by.
    """
    inputs_TI = inputs_BLI.flatten(0, -2).float()
    if weighting == "inverse_norm":
        power_T1 = residual_BLD.flatten(0, -2).float().pow(2).mean(-1, keepdim=True)
        inputs_TI = inputs_TI * power_T1.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    for start in range(0, gram_II.shape[0], TILE):
        stop = start + TILE
        gram_II[start:stop, start:].addmm_(inputs_TI[:, start:stop].T, inputs_TI[:, start:])


def _mirror(gram_II: torch.Tensor) -> None:
    """Copy the part above the diagonal below it, in place."""
    gram_II.triu_().add_(gram_II.triu(1).T)


def _warn_if_few_tokens(num_samples: int, max_seq_length: int, width: int) -> None:
    num_tokens = num_samples * max_seq_length
    per_dimension = num_tokens / width
    if per_dimension < 20:
        logger.warning(
            "%d calibration tokens are %.1f for each of the %d inputs of the widest output layer; "
            "under 20 the fold begins to fit the text instead of the model. Raise "
            "data.calibration.num_samples to %d or more",
            num_tokens,
            per_dimension,
            width,
            -(-20 * width // max_seq_length),
        )
